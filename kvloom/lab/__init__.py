"""The lab: runs recipes on a model and a text and says what they cost; tables, pages and checks."""
