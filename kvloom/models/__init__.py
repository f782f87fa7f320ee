"""The bundled reference model and how it was trained."""
