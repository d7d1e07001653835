"""Draft and verify: cheap guesses, judged by the model in one forward; the text stays its own."""
