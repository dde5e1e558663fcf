"""Small tokenizers trained on the spot, written as Hugging Face folders of the kinds models come with."""

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = (
    "The quick brown fox jumps over the lazy dog. InferFlux serves language models, page by page.\n",
    "def attend(query, key, value):\n    return softmax(query @ key.T) @ value\n",
    "naïve café 東京都 こんにちは世界 مرحبا بالعالم שלום עולם Привет мир 12345 + 67890 = 80235\n",
    "Numbers: 1, 2, 3; symbols: <>|[]{}#$%&*; emoji: 😀 👩‍👩‍👧 🇫🇷\t tabs  and   spaces\n",
) * 12

# Texts that have broken tokenizers before: empty, spaces, control characters, joined emoji, marks, right to left.
TEXTS = (
    "",
    "a",
    "hello world",
    "  two leading and trailing  ",
    "line\nbreaks\r\n\n\tand tabs",
    "NUL \0 inside",
    "😀 👩‍👩‍👧‍👦 🇫🇷 🏳️‍🌈",
    "e\u0301 Z\u0351\u036f\u0343 a\u0308 combining",
    "漢字かな交じり文 한국어 𠮷野家",
    "مرحبا \u202eabc\u202c שלום",
    "\ufeff\u200b\u00a0\u2028 odd spaces \u2581 mark",
    "<|start|>user hi<|end|> <s>x</s> </s><unk>",
    "ÃĠĊ looks like byte characters",
    "<0x41> looks like a byte token",
)


def write_byte_level(folder: Path, **config: Any) -> Path:
    """GPT-2, Llama 3 and Qwen style: byte-level BPE with two special tokens and one ordinary added token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<|start|>", "<|end|>", "<s>")])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return _write(folder, tokenizer, {"bos_token": "<s>", "eos_token": "<|end|>", **config})


def write_byte_fallback(folder: Path, *, drops_space: bool = True, **config: Any) -> Path:
    """Llama 2 (`drops_space`) and Gemma style in tokenizer.json: marks for spaces, byte tokens for what is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), space]) if drops_space else space
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS[:2], trainer)
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = plain["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(plain))
    strip = [decoders.Strip(content=" ", left=1)] if drops_space else []
    stages = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(stages)
    return _write(folder, tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **config})


def write_sentencepiece(folder: Path, *, model_type: str = "bpe", dummy_prefix: bool = True, **config: Any) -> Path:
    """Llama 2 and Mistral (`dummy_prefix`) or Gemma style: only SentencePiece's tokenizer.model and a config."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=380,
        model_type=model_type,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy_prefix,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _write(folder: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
