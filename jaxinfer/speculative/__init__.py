"""Draft and verify: a cheap guess, judged by the model in one forward, that never changes output."""
