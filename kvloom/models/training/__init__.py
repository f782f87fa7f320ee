"""How the bundled reference model was made: tokenizer, data, recall tasks, trainer and evaluation."""
