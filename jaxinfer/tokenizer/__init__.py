"""Text <-> ids, at the edge only: everything below it sees ids.

files.py  load_tokenizer, save_tokenizer: a folder of tokenizer files, or one file
gguf.py   tokenizer_from_gguf: rebuilt from the metadata of a GGUF file
bpe.py    the `tokenizers` backend: tokenizer.json, and byte-level BPE
spm.py    the `sentencepiece` backend: tokenizer.model, and GGUF's "llama"
base.py   Tokenizer and Detokenizer, the same for every backend
"""

from jaxinfer.tokenizer.base import Detokenizer, Tokenizer
from jaxinfer.tokenizer.files import load_tokenizer, save_tokenizer
from jaxinfer.tokenizer.gguf import tokenizer_from_gguf

__all__ = ["Detokenizer", "Tokenizer", "load_tokenizer", "save_tokenizer", "tokenizer_from_gguf"]
