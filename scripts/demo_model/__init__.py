"""How the demo model is made: questions as data, corpus, tokenizer, training, evaluation. Not part of the package."""
