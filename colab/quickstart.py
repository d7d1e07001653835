# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # jaxinfer: a language model answers faster, and says the same
#
# Runs as it is on a Colab TPU, a GPU or a CPU. The first cell installs the library where it is
# missing, with the JAX that fits the device.

# %%
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("jaxinfer") is None:
    tpu = any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    extras = "plot,tpu" if tpu else "plot,cuda" if shutil.which("nvidia-smi") else "plot"
    # From the checkout that this notebook lies in, else from the package index.
    here = Path("..").resolve() if Path("../pyproject.toml").exists() else "jaxinfer"
    if subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", f"{here}[{extras}]"]
    ).returncode:
        raise SystemExit(f"pip could not install {here}: open this notebook in a checkout of it")

# %% [markdown]
# ## Which device?

# %%
import jax

import jaxinfer

print(jaxinfer.__version__, "on", jax.devices())

# %% [markdown]
# ## Ask a real model
#
# SmolLM2-135M-Instruct is the default: 98 MB to fetch, the first time.

# %%
llm = jaxinfer.load("smollm2-135m-instruct")
question = [{"role": "user", "content": "What is the capital of France?"}]
print(llm.chat(question, max_tokens=32).text)

# %% [markdown]
# ## Stream
#
# Pieces come as they are made. Same seed, same text.

# %%
for piece in llm.stream("Once upon a time", max_tokens=48, temperature=0.8, seed=1):
    print(piece, end="", flush=True)

# %% [markdown]
# ## Speculate
#
# A drafter guesses the next tokens, the model judges them all in one forward, and what is kept is
# what it would have said alone. Text between `[` and `]` came in a round that kept drafted tokens.

# %%
task = (
    "Write this list again, in the same order: three red apples, four green pears, five yellow"
    " plums, six blue grapes, seven black figs."
)
ids = llm.chat_ids([{"role": "user", "content": task}])
plain = llm.generate(ids, max_tokens=48)
fast = llm.generate(ids, max_tokens=48, drafter="ngram")
print("the same text:", fast.text == plain.text)
print(f"{fast.stats.tokens_per_round:.2f} tokens a round")

for piece in llm.stream(ids, max_tokens=48, drafter="ngram"):
    print(f"[{piece}]" if any(piece.drafted) else piece, end="", flush=True)

# %% [markdown]
# ## How much faster?
#
# Tokens per second by kind of prompt: lookup pays where the answer repeats what was said before,
# and `auto` keeps it from costing anything where it does not. `jaxinfer bench` measures at length.

# %%
# %matplotlib inline
from jaxinfer.bench import plot, speed
from jaxinfer.bench.prompts import PROMPTS, chat_or_plain

prompts = {kind: [chat_or_plain(llm, texts[-1])] for kind, texts in PROMPTS.items()}
result = speed.compare(llm, {"ngram": "ngram"}, prompts, max_tokens=48, runs=2, costs=False)
plot.draw(result)
