"""What is fed to the model: partial prefill over stored chunks, edits, parallel contexts. One file per published system."""
