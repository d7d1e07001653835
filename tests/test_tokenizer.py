"""Tokenizers: ids equal a reference's, decoding and streaming agree, files that lie are refused."""

from __future__ import annotations

import codecs
import io
import json
import shutil
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizer_golden as golden
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.trainers import BpeTrainer

from jaxinfer.checkpoint.gguf import GGUFFile
from jaxinfer.errors import InvalidArgument, ModelNotFound, UnsupportedModel
from jaxinfer.tokenizer import Tokenizer, load_tokenizer, save_tokenizer, tokenizer_from_gguf

KEY = golden.KEY
GOLDEN = json.loads(golden.GOLDEN.read_text())


@pytest.fixture(scope="session")
def metadata(smollm2_path: str, gemma3_path: str) -> dict[str, dict[str, Any]]:
    paths = {"smollm2": smollm2_path, "gemma3": gemma3_path}
    return {name: dict(GGUFFile(path).metadata) for name, path in paths.items()}


@pytest.fixture(scope="session")
def real(metadata: dict[str, dict[str, Any]]) -> dict[str, Tokenizer]:
    return {name: tokenizer_from_gguf(values) for name, values in metadata.items()}


def plain_ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [tokenizer.encode(text, add_special=False) for text in texts]


# ---- ids are those of the reference -------------------------------------------------------------


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_ids_of_a_real_vocabulary(name, real, metadata):
    strings = golden.strings_for(metadata[name])
    assert sum(map(len, strings.values())) > 10_000
    assert golden.digests(strings, lambda t: plain_ids(real[name], t)) == GOLDEN[name]


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_ids_of_a_few_strings_one_by_one(name, real):
    for text, ids in GOLDEN[f"{name} sample"]:
        assert real[name].encode(text, add_special=False) == ids, text


@pytest.mark.parametrize("name", sorted(golden.made_up()))
def test_ids_of_a_made_up_vocabulary(name):
    """Every rule that cuts a text into words; a space in front, or none; tokens that strip."""
    values = golden.made_up()[name]
    strings = golden.strings_for(values, made_up=True)
    if name == "spm phi3":  # llama.cpp knows the family by its name, we by its architecture
        values["general.architecture"] = "phi3"
    tokenizer = tokenizer_from_gguf(values)
    assert golden.digests(strings, lambda t: plain_ids(tokenizer, t)) == GOLDEN[name]


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_ids_against_llama_cpp(name, real, request):
    pytest.importorskip("xllamacpp", reason="the reference implementation is not installed")
    texts = [s for kind in golden.base_strings().values() for s in kind[::7] if "▁" not in s]
    with golden.llama_cpp(request.getfixturevalue(f"{name}_path")) as encode:
        expected = encode(texts)
    for text, ours, theirs in zip(texts, plain_ids(real[name], texts), expected, strict=True):
        assert ours == theirs, text


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_ids_against_transformers(name, real, metadata, request):
    """Its conversion of GGUF is independent of llama.cpp, and wrong in one way for each model."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    path = Path(request.getfixturevalue(f"{name}_path"))
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    def comparable(text: str) -> bool:
        if name == "smollm2":  # it does not cut out the digits first
            return not any(map(str.isnumeric, text))
        return " " * 32 not in text.replace("▁", " ")  # it finds the two runs of 16 first

    texts = [s for kind in golden.base_strings().values() for s in kind if comparable(s)]
    assert len(texts) > 9_000
    expected = theirs(texts, add_special_tokens=False)["input_ids"]
    for text, ours, ids in zip(texts, plain_ids(real[name], texts), expected, strict=True):
        assert ours == ids, text
    assert real[name].encode("Hello") == theirs("Hello")["input_ids"]  # with or without BOS


def test_qwen_composes_characters():
    """NFC, as its tokenizer.json has it (and llama.cpp has not)."""
    composing = tokenizer_from_gguf(golden.bpe_metadata("qwen2"))
    literal = tokenizer_from_gguf(golden.bpe_metadata("deepseek-r1-qwen"))
    texts = [*golden.base_strings()["mixed"], "e\u0301", "\u1100\u1161", "\u212b", "o\u0308\u0323"]
    composed = [unicodedata.normalize("NFC", text) for text in texts]
    assert plain_ids(composing, texts) == plain_ids(literal, composed)
    assert plain_ids(composing, texts) != plain_ids(literal, texts)


def test_other_names_of_a_rule():
    for name, same in ("llama3", "llama-bpe"), ("llama-v3", "llama-bpe"), ("dbrx", "smaug-bpe"):
        values = golden.bpe_metadata(name)
        strings = golden.strings_for(values, made_up=True)
        tokenizer = tokenizer_from_gguf(values)
        assert golden.digests(strings, lambda t: plain_ids(tokenizer, t)) == GOLDEN[f"bpe {same}"]  # noqa: B023


# ---- special tokens -----------------------------------------------------------------------------


def test_special_tokens_of_the_real_models(real):
    smollm2, gemma3 = real["smollm2"], real["gemma3"]
    assert (smollm2.vocab_size, smollm2.bos_id, smollm2.adds_bos) == (49152, 1, False)
    assert (smollm2.bos_token, smollm2.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert smollm2.eos_ids == (2, 0)  # <|im_end|> is named, <|endoftext|> is well known
    assert smollm2.chat_template is not None
    assert (gemma3.vocab_size, gemma3.bos_id, gemma3.adds_bos) == (262144, 2, True)
    assert (gemma3.bos_token, gemma3.eos_token) == ("<bos>", "<eos>")
    # <end_of_turn> is well known. </s> is not a control token here, but closes a tag of HTML.
    assert gemma3.eos_ids == (1, 106)
    assert gemma3.chat_template is None
    assert gemma3.encode("<s>x</s>") == [2, *gemma3.encode("<s>x</s>", add_special=False)]
    assert gemma3.decode(gemma3.encode("<s>x</s>")) == "<s>x</s>"
    assert smollm2.id_to_token(905) == "Ġworld" or smollm2.id_to_token(905)
    assert gemma3.id_to_token(236743) == "▁"


def test_end_tokens_of_gguf_are_joined():
    values = golden.bpe_metadata("llama-bpe")
    ids = {text: i for i, text in enumerate(values[KEY + "tokens"])}
    values[KEY + "eot_token_id"] = ids["<think>"]
    tokenizer = tokenizer_from_gguf(values)
    assert tokenizer.eos_ids == (ids["</s>"], ids["<think>"], ids["<|im_end|>"])
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.adds_bos  # by the rule's default
    assert not tokenizer_from_gguf({**values, KEY + "add_bos_token": False}).adds_bos
    del values[KEY + "eos_token_id"]
    assert tokenizer_from_gguf(values).eos_ids == (ids["<think>"], ids["<|im_end|>"])


def test_special_tokens_are_found_in_text_and_left_out_of_it(real):
    smollm2 = real["smollm2"]
    ids = smollm2.encode("a<|im_end|>b")
    assert 2 in ids
    assert smollm2.decode(ids) == "ab"
    assert smollm2.decode(ids, skip_special=False) == "a<|im_end|>b"
    # One character of the two comes from each side of the token.
    e, acute = smollm2.encode("é")[0], 2
    halves = [i for c in "é".encode() for i in [_byte_id(smollm2, c)]]
    assert smollm2.decode([halves[0], acute, halves[1]]) == "é"
    assert e != acute


def _byte_id(tokenizer: Tokenizer, byte: int) -> int:
    return next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == bytes([byte]))


def test_text_that_is_none(real):
    for wrong in None, 3, b"bytes", ["a"]:
        with pytest.raises(InvalidArgument, match="expected a str"):
            real["smollm2"].encode(wrong)
    for tokenizer in real.values():
        with pytest.raises(InvalidArgument, match="half a character"):
            tokenizer.encode("a\ud800")
        with pytest.raises(InvalidArgument, match="outside"):
            tokenizer.id_to_token(tokenizer.vocab_size)
        assert tokenizer.decode([]) == ""
        assert tokenizer.decode([tokenizer.vocab_size, -1, 10**12]) == ""  # a padded vocabulary


# ---- decoding and streaming ---------------------------------------------------------------------


def expected_bytes(metadata: dict[str, Any]) -> list[bytes]:
    """The bytes of every token, written independently of the library."""
    tokens, types = metadata[KEY + "tokens"], metadata[KEY + "token_type"]
    if metadata[KEY + "model"] == "llama":
        return [
            bytes([int(t[3:5], 16)])
            if kind == 6
            else (t if kind == 3 else t.replace("▁", " ")).encode()
            for t, kind in zip(tokens, types, strict=True)
        ]
    byte_of = {c: b for b, c in enumerate(golden._byte_alphabet())}
    return [
        t.encode() if kind in (3, 4) else bytes(byte_of[c] for c in t)
        for t, kind in zip(tokens, types, strict=True)
    ]


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_every_id_alone(name, real, metadata):
    tokenizer = real[name]
    for i, data in enumerate(expected_bytes(metadata[name])):
        stream = tokenizer.stream(skip_special=False)
        pushed, rest = stream.push(i), stream.finish()
        assert pushed + rest == data.decode(errors="replace"), i
        # Whatever is whole comes at once; only half a character waits.
        assert pushed == codecs.getincrementaldecoder("utf-8")("replace").decode(data), i
        if i in tokenizer.special_ids:
            assert tokenizer.decode([i]) == ""


@pytest.mark.parametrize("name", ["smollm2", "gemma3", "spm"])
def test_random_ids(name, real, metadata):
    values = golden.made_up()[name] if name == "spm" else metadata[name]
    tokenizer = tokenizer_from_gguf(values) if name == "spm" else real[name]
    data = expected_bytes(values)
    odd = [i for i, d in enumerate(data) if len(d) == 1 and d[0] > 0x7F]  # half characters
    ids = st.one_of(st.integers(0, len(data) - 1), st.sampled_from(odd), st.sampled_from([0, 1, 2]))

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.lists(ids, max_size=30), st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        stream = tokenizer.stream(skip_special=skip)
        pieces = [stream.push(i) for i in ids]
        whole = b"".join(data[i] for i in ids if not (skip and i in tokenizer.special_ids))
        if tokenizer.strips_space:
            whole = whole.removeprefix(b" ")
        text = whole.decode(errors="replace")
        assert "".join([*pieces, stream.finish()]) == text
        assert tokenizer.decode(ids, skip_special=skip) == text
        assert tokenizer.decode(np.array(ids, np.int32), skip_special=skip) == text
        # Nothing that was handed out is taken back when more comes.
        assert text.startswith("".join(pieces))

    check()


def test_text_comes_back(real):
    strings = golden.base_strings()
    for tokenizer in real["gemma3"], tokenizer_from_gguf(golden.bpe_metadata("llama-bpe")):
        for kind in "blocks", "emoji", "white", "prose", "programs", "mixed":
            for text in strings[kind][::5]:
                if "▁" not in text:
                    ids = tokenizer.encode(text)
                    assert tokenizer.decode(ids[tokenizer.adds_bos :], skip_special=False) == text


def test_long_runs_of_half_characters_take_linear_time(real):
    start = time.process_time()
    stream = real["smollm2"].stream()
    half = _byte_id(real["smollm2"], 0xE2)
    assert "".join(stream.push(half) for _ in range(50_000)) == "\ufffd" * 49_999
    assert stream.finish() == "\ufffd"
    assert time.process_time() - start < 2


# ---- tokenizer.json -----------------------------------------------------------------------------

CORPUS = [" ".join(golden.base_strings()["prose"][i::50]) for i in range(50)]


def byte_level_backend() -> Backend:
    """Trained here: as the tokenizer.json of Llama 3, small."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("éé", normalized=False), AddedToken("<tool>")])
    bos = ("<|begin_of_text|>", 0)
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[bos]
    )
    return backend


def metaspace_backend() -> Backend:
    """As the tokenizer.json of Llama 2: bytes for what is unknown, a space in front."""
    special = ["<unk>", "<s>", "</s>"]
    byte = [f"<0x{b:02X}>" for b in range(256)]
    letters = ["▁", *"thequickbrownfxjmpsvlazydg", "é"]
    letters = list(dict.fromkeys(letters))
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "q"), ("o", "w"), ("▁", "▁")]
    tokens = [*special, *byte, *letters, *(a + b for a, b in merges)]
    vocab = {t: i for i, t in enumerate(tokens)}
    backend = Backend(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    spaces, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return backend


BACKENDS = {"byte-level": byte_level_backend, "metaspace": metaspace_backend}


@pytest.mark.parametrize("name", BACKENDS)
def test_tokenizer_json(name, tmp_path):
    backend = BACKENDS[name]()
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    texts = [s for kind in golden.base_strings().values() for s in kind[::5]]
    texts += golden.special_strings(["<s>", "</s>", "<|eot_id|>", "éé", "<tool>"])
    for text, theirs in zip(texts, backend.encode_batch(texts), strict=True):
        assert ours.encode(text) == theirs.ids
        assert ours.encode(text, add_special=False) == theirs.ids[1:]
        for skip in True, False:
            if "éé" not in text:  # the library takes this token for two bytes
                decoded = backend.decode(theirs.ids, skip_special_tokens=skip)
                assert ours.decode(theirs.ids, skip_special=skip) == decoded
    assert (ours.bos_id, ours.adds_bos) == ((0, True) if name == "byte-level" else (1, True))
    assert ours.eos_ids == ((1, 2) if name == "byte-level" else (2,))
    assert ours.decode(ours.encode("xéé y")) == "xéé y"
    assert load_tokenizer(tmp_path / "tokenizer.json").encode("the fox") == ours.encode("the fox")


@pytest.mark.parametrize("name", BACKENDS)
def test_tokenizer_json_against_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    backend = BACKENDS[name]()
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    begin = "<|begin_of_text|>" if name == "byte-level" else "<s>"
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token=begin)
    ours = load_tokenizer(tmp_path)
    for text in golden.base_strings()["mixed"][::5]:
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(theirs(text)["input_ids"]) == theirs.decode(
            theirs(text)["input_ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_settings_beside_tokenizer_json(tmp_path):
    backend = byte_level_backend()
    backend.enable_truncation(3)  # left over from a training run
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    config: dict[str, Any] = {"eos_token": {"content": "<|eot_id|>"}, "chat_template": "config"}
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"})
    )

    def load(**more: Any) -> Tokenizer:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **more}))
        return load_tokenizer(tmp_path)

    text = "the quick brown fox"
    assert len(load().encode(text)) > 8
    assert len(load().encode("a")) == 2
    assert load().eos_token == "<|eot_id|>"
    assert load().eos_ids == (2, 1)  # named first; <|end_of_text|> is well known
    assert load(eos_token_id=[5, 6]).eos_ids == (2, 5, 6, 1)
    assert load().bos_token == "<|begin_of_text|>"
    assert load().encode(text)[0] == 0
    assert not load(add_bos_token=False).adds_bos
    assert load(add_bos_token=False).encode(text) == load().encode(text)[1:]
    assert load(add_bos_token=True).encode(text) == load().encode(text)

    assert load().chat_template == "config"
    named = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}]
    assert load(chat_template=named).chat_template == "a"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert load().chat_template == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert load().chat_template == "jinja"


def test_dropout_of_training_is_switched_off(tmp_path):
    backend = byte_level_backend()
    backend.model.dropout = 0.9
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert len({tuple(tokenizer.encode("the quick brown fox")) for _ in range(20)}) == 1


# ---- tokenizer.model ----------------------------------------------------------------------------


@pytest.fixture(scope="session", params=["unigram", "bpe", "bpe without prefix"])
def model_file(request) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=out,
        vocab_size=440,
        model_type=request.param.split()[0],
        byte_fallback=True,
        user_defined_symbols=["<tag>", "▁▁"],
        control_symbols=["<|im_end|>"],
        add_dummy_prefix="without" not in request.param,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=100_000,
        minloglevel=2,
    )
    return out.getvalue()


def test_tokenizer_model(model_file, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model_file)
    ours = load_tokenizer(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model_file)
    texts = [s for kind in golden.base_strings().values() for s in kind[::5]]
    texts = [s for s in texts if not any(c in s for c in ("<unk>", "<s>", "</s>", "<|im_end|>"))]
    assert plain_ids(ours, texts) == theirs.encode(texts)
    for text, ids in zip(texts, theirs.encode(texts), strict=True):
        if "\0" not in text:
            assert ours.decode(ids) == theirs.decode(ids)
    assert ours.encode("fox") == [theirs.bos_id(), *theirs.encode("fox")]
    end = theirs.piece_to_id("<|im_end|>")
    assert ours.eos_ids == (theirs.eos_id(), end)
    halves = [*theirs.encode("the"), end, *theirs.encode("fox")]
    assert ours.encode("the<|im_end|>fox", add_special=False) == halves
    assert load_tokenizer(tmp_path / "tokenizer.model").encode("fox") == ours.encode("fox")


def test_tokens_added_to_a_model_file(model_file, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model_file)
    added = {
        "440": {"content": "<|user|>", "special": True, "rstrip": True},
        "441": {"content": "<think>", "special": False},
    }
    config = {"added_tokens_decoder": added, "add_bos_token": False, "eos_token": "<|user|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    fox = sentencepiece.SentencePieceProcessor(model_proto=model_file).encode("fox")
    assert ours.vocab_size == 442
    assert ours.encode("<|user|> \n fox<think>fox") == [440, *fox, 441, *fox]
    assert ours.decode([441, 440]) == "<think>"
    assert ours.eos_ids[0] == 440
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new>": 440}))
    assert load_tokenizer(tmp_path).encode("<new>", add_special=False) == [440]


# ---- saving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bpe qwen2", "bpe smollm", "spm", "spm phi3"])
def test_saved_and_loaded(name, tmp_path):
    values = {**golden.made_up(), "bpe qwen2": golden.bpe_metadata("qwen2")}[name]
    if name == "spm phi3":
        values["general.architecture"] = "phi3"
    values = {**values, "tokenizer.chat_template": "{{ 1 }}", KEY + "eot_token_id": 7}
    before = tokenizer_from_gguf(values)
    save_tokenizer(before, tmp_path)
    after = load_tokenizer(tmp_path)
    fields = "vocab_size bos_id eos_ids adds_bos bos_token eos_token chat_template special_ids"
    for field in [*fields.split(), "strips_space"]:
        assert getattr(after, field) == getattr(before, field), field
    texts = [s for kind in golden.strings_for(values, made_up=True).values() for s in kind[::3]]
    assert [after.encode(s) for s in texts] == [before.encode(s) for s in texts]
    ids = list(range(before.vocab_size))[::7]
    assert after.decode(ids) == before.decode(ids)


def test_real_vocabularies_saved_and_loaded(real, tmp_path):
    for name, before in real.items():
        (tmp_path / name).mkdir()
        save_tokenizer(before, tmp_path / name)
        after = load_tokenizer(tmp_path / name)
        texts = golden.base_strings()["mixed"]
        assert [after.encode(s) for s in texts] == [before.encode(s) for s in texts]
        assert (after.eos_ids, after.bos_id, after.adds_bos, after.chat_template) == (
            before.eos_ids,
            before.bos_id,
            before.adds_bos,
            before.chat_template,
        )


def test_nothing_to_save(tmp_path):
    with pytest.raises(InvalidArgument, match="no files to save"):
        save_tokenizer(object(), tmp_path)  # type: ignore[arg-type]


# ---- speed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "seconds"), [("smollm2", 0.6), ("gemma3", 1.5)])
def test_built_quickly(name, seconds, metadata):
    start = time.process_time()
    tokenizer_from_gguf(metadata[name])
    assert time.process_time() - start < seconds


# ---- files that lie: see test_tokenizer_files.py ------------------------------------------------


def test_no_tokenizer_there(tmp_path):
    with pytest.raises(ModelNotFound, match=r"no tokenizer\.json and no tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelNotFound):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("pre", ["default", "falcon", "gpt-4o", "no-such-rule"])
def test_an_unknown_rule_is_refused_by_name(pre):
    with pytest.raises(UnsupportedModel, match=pre):
        tokenizer_from_gguf({**golden.bpe_metadata("gpt-2"), KEY + "pre": pre})


@pytest.mark.parametrize("model", ["t5", "bert", "rwkv", "gemma4", "no_vocab"])
def test_an_unknown_kind_is_refused_by_name(model):
    with pytest.raises(UnsupportedModel, match=model):
        tokenizer_from_gguf({**golden.bpe_metadata("gpt-2"), KEY + "model": model})


def test_links_of_a_hub_cache_are_followed(tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    byte_level_backend().save(str(blobs / "abc"))
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "tokenizer.json").symlink_to("../blobs/abc")
    assert load_tokenizer(folder).vocab_size > 0
    shutil.rmtree(blobs)
    with pytest.raises(ModelNotFound):
        load_tokenizer(folder)
