"""Tokenizers small enough to commit, in the files that published ones have.

They know a short list of words as one token each and spell out everything else, so that any prompt is encoded. They are
written rather than trained: the same files each time, whatever the library version.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastvideo_grpo.tiny.shapes import COLOURS, SHAPES

WORDS = (*COLOURS, *SHAPES, "a", "an", "and", "as", "at", "by", "cat", "dog", "from", "full", "in", "is", "light",
         "night", "of", "on", "over", "photo", "picture", "sea", "snow", "the", "to", "tree", "two", "under", "water",
         "white", "black", "with", "walks", "grass", "realistic", "style")

# The words of video models; a list of its own, since another token would move the ids of FLUX's.
VIDEO_WORDS = (*WORDS, "moving", "left", "right", "up", "down")

CLIP_LENGTH = 77
T5_LENGTH = 512
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- CLIP: byte-level BPE


def clip_vocabulary(words: Sequence[str] = WORDS) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and the merges in order of rank, laid out as CLIP's: bytes, bytes that end a word, merges, the two
    special tokens last (the pooled embedding is read at the largest id)."""
    letters = list(_byte_letters())
    merges: list[tuple[str, str]] = []
    for word in words:
        tokens = [*word[:-1], word[-1] + "</w>"]
        for merge in merges:
            tokens = _merge(tokens, merge)
        while len(tokens) > 1:
            merges.append((tokens[0], tokens[1]))
            tokens = _merge(tokens, merges[-1])
    merged = dict.fromkeys(left + right for left, right in merges)
    tokens = [*letters, *(letter + "</w>" for letter in letters), *merged]
    return {token: index for index, token in enumerate([*tokens, CLIP_START, CLIP_END])}, merges


def write_clip_tokenizer(folder: Path, words: Sequence[str] = WORDS) -> None:
    """Write vocab.json, merges.txt, special_tokens_map.json and tokenizer_config.json."""
    folder.mkdir(parents=True)
    vocabulary, merges = clip_vocabulary(words)
    write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    marks = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    start: dict[str, Any] = {"content": CLIP_START, **marks}
    end: dict[str, Any] = {"content": CLIP_END, **marks, "normalized": False}
    added = {str(vocabulary[token["content"]]): {**token, "special": True} for token in (start, end)}
    write_json(folder / "special_tokens_map.json", {
        "bos_token": start, "eos_token": end, "pad_token": CLIP_END, "unk_token": end})
    write_json(folder / "tokenizer_config.json", {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "bos_token": CLIP_START,
        "clean_up_tokenization_spaces": False,  # published: true, which newer transformers ignore with a long warning
        "do_lower_case": True,
        "eos_token": CLIP_END,
        "errors": "replace",
        "model_max_length": CLIP_LENGTH,
        "pad_token": CLIP_END,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": CLIP_END,
    })


def _byte_letters() -> list[str]:
    """The printable letters that stand for the 256 bytes in byte-level BPE: printable bytes are themselves, in that
    order first, and the others follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(others)]


def _merge(tokens: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for token in tokens:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


# --- T5: unigram


T5_EXTRA_IDS = 100
T5_SPECIAL = ("<pad>", "</s>", "<unk>")
UMT5_SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")


def t5_pieces(words: Sequence[str] = WORDS, special: Sequence[str] = T5_SPECIAL) -> list[tuple[str, float]]:
    """Pieces with their log-probability, special ones first; without the sentinels, as in a spiece.model."""
    known = [("▁" + word, -5.0) for word in words]
    letters = [(chr(code), -10.0) for code in range(ord("!"), ord("~") + 1)]
    return [*((token, 0.0) for token in special), ("▁", -10.0), *known, *letters]


def t5_sentinels() -> list[str]:
    return [f"<extra_id_{index}>" for index in range(T5_EXTRA_IDS)]


def write_t5_tokenizer(folder: Path, words: Sequence[str] = WORDS, special: Sequence[str] = T5_SPECIAL) -> None:
    """Write spiece.model, tokenizer.json, special_tokens_map.json and tokenizer_config.json; `special`: T5's or UMT5's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    folder.mkdir(parents=True)
    pieces = t5_pieces(words, special)
    (folder / "spiece.model").write_bytes(_sentencepiece_model(pieces, special))

    sentinels = t5_sentinels()
    # The sentinels count down: the last id of the vocabulary is <extra_id_0>.
    tokenizer = Tokenizer(models.Unigram([*pieces, *((token, 0.0) for token in reversed(sentinels))],
                                         unk_id=special.index("<unk>")))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    added = [*special, *sentinels]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in added])
    tokenizer.save(str(folder / "tokenizer.json"))

    marks = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    begins = {"bos_token": "<s>"} if "<s>" in special else {}
    named = {**begins, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", {
        "additional_special_tokens": sentinels,
        **{name: {"content": token, **marks} for name, token in named.items()},
    })
    write_json(folder / "tokenizer_config.json", {
        "add_prefix_space": True,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {"content": token, **marks, "special": True} for token in added},
        "additional_special_tokens": sentinels,
        **begins,
        "clean_up_tokenization_spaces": True,
        "eos_token": "</s>",
        "extra_ids": T5_EXTRA_IDS,
        "legacy": True,
        "model_max_length": T5_LENGTH,
        "pad_token": "<pad>",
        "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer",
        "unk_token": "<unk>",
    })


def _sentencepiece_model(pieces: list[tuple[str, float]], special: Sequence[str]) -> bytes:
    """The pieces as a sentencepiece model. No text normalisation: T5's NFKC table alone would be 240 kB."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2  # its names are made at import
    model = proto.ModelProto()
    kinds = {token: "UNKNOWN" if token == "<unk>" else "CONTROL" for token in special}
    for piece, score in pieces:
        kind = proto.ModelProto.SentencePiece.Type.Value(kinds.get(piece, "NORMAL"))
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = proto.TrainerSpec.UNIGRAM
    model.trainer_spec.vocab_size = len(pieces)
    model.trainer_spec.pad_id, model.trainer_spec.eos_id = 0, 1
    model.trainer_spec.unk_id = special.index("<unk>")
    model.trainer_spec.bos_id = special.index("<s>") if "<s>" in special else -1
    model.trainer_spec.pad_piece = "<pad>"
    model.normalizer_spec.name = "identity"
    return model.SerializeToString(deterministic=True)


# --- Llama 3: byte-level BPE that takes a whole word where it knows it


LLAMA_LENGTH = 8192
LLAMA_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<pad>")
# Where Llama 3 splits a text: contractions, words with the mark or space before them, up to three digits, signs, breaks.
LLAMA_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
               r"\s+(?!\S)|\s+")


def llama_vocabulary(words: Sequence[str], text: str) -> dict[str, int]:
    """Token -> id, laid out as Llama 3's: bytes, longer tokens, special tokens last.

    Every piece into which Llama 3 splits `text` is one token, and so is each of `words`, with and without a space before
    it. Llama 3's own vocabulary has the pieces of ordinary English too, so that `text` is as long here as it is there.
    """
    splitter = _llama_splitter()
    parts = re.split("|".join(re.escape(token) for token in LLAMA_SPECIAL), text)
    pieces = [piece for part in (*parts, *words, *(" " + word for word in words))
              for piece, _ in splitter.pre_tokenize_str(part)]
    tokens = dict.fromkeys([*_byte_letters(), *pieces, *LLAMA_SPECIAL])
    return {token: index for index, token in enumerate(tokens)}


def write_llama_tokenizer(folder: Path, words: Sequence[str], text: str) -> None:
    """Write tokenizer.json, special_tokens_map.json and tokenizer_config.json; `words` and `text` as for the vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    folder.mkdir(parents=True)
    vocabulary = llama_vocabulary(words, text)
    # As in Llama 3's file, a whole piece that is in the vocabulary needs no merges. What is not stays in bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = _llama_splitter()
    start, end, pad = LLAMA_SPECIAL[0], LLAMA_SPECIAL[1], LLAMA_SPECIAL[-1]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[start, "$A"], pair=[start, "$A", f"{start}:1", "$B:1"], special_tokens=[(start, vocabulary[start])])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in LLAMA_SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))

    marks = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    named = {"bos_token": start, "eos_token": end, "pad_token": pad}
    write_json(folder / "special_tokens_map.json", {name: {"content": token, **marks} for name, token in named.items()})
    write_json(folder / "tokenizer_config.json", {
        "added_tokens_decoder": {
            str(vocabulary[token]): {"content": token, **marks, "special": True} for token in LLAMA_SPECIAL},
        **named,
        "clean_up_tokenization_spaces": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": LLAMA_LENGTH,
        "padding_side": "right",
        # Published: LlamaTokenizer, for which transformers 5 makes a tokenizer of Llama 2's kind, whatever the file says.
        "tokenizer_class": "PreTrainedTokenizerFast",
    })


def _llama_splitter() -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# --- Qwen2: byte-level BPE, here without merges: every byte is a token


QWEN2_SPECIAL = tuple(f"<|{name}|>" for name in (
    "endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start",
    "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"))


def qwen2_vocabulary() -> dict[str, int]:
    """Token -> id, laid out as Qwen2-VL's: bytes first, special tokens last."""
    return {token: index for index, token in enumerate([*_byte_letters(), *QWEN2_SPECIAL])}


def write_qwen2_tokenizer(folder: Path, chat_template: str) -> None:
    """Write vocab.json, merges.txt, tokenizer.json, tokenizer_config.json and chat_template.json."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    folder.mkdir(parents=True)
    vocabulary = qwen2_vocabulary()
    letters = {token: index for token, index in vocabulary.items() if token not in QWEN2_SPECIAL}
    write_json(folder / "vocab.json", letters)
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    # Llama 3's splits, but for digits, which go one by one.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in QWEN2_SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))

    marks = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    write_json(folder / "tokenizer_config.json", {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(vocabulary[token]): {"content": token, **marks, "special": True} for token in QWEN2_SPECIAL},
        "additional_special_tokens": list(QWEN2_SPECIAL[1:]),
        "bos_token": None,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    })
    write_json(folder / "chat_template.json", {"chat_template": chat_template})
