"""Tiny random encoders, made and run by transformers: the oracle of their tests. A WordPiece tokenizer besides."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedModel

from tests.support.models import randomise

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "infer", "##flux", "serves", "##s", "models", "page", "by", "!")
NUM_POSITIONS = 64
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": NUM_POSITIONS,
}


def write_encoder(folder: Path, kind: str = "Bert", *, pooling: str | None = None, **changes: Any) -> PreTrainedModel:
    """Writes a model folder and returns the transformers model. kind: Bert, Roberta or XLMRoberta. pooling: what
    sentence-transformers' settings say, when there are to be any."""
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    model: PreTrainedModel = getattr(transformers, f"{kind}Model")(config).eval()
    randomise(model, seed=len(kind))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                weight.clamp_(0.5, 1.5)
    model.save_pretrained(folder)
    write_word_piece(folder)
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        modes = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, f"pooling_mode_{pooling}": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 48, **modes}))
    return model


def write_word_piece(folder: Path) -> None:
    """BERT's tokenizer: lower case, pieces of words, [CLS] before and [SEP] behind."""
    vocab = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    )
    tokenizer.add_special_tokens(list(WORDS[:5]))
    tokenizer.save(str(folder / "tokenizer.json"))


def reference(model: PreTrainedModel, token_ids: list[int], pooling: str) -> list[float]:
    """Returns the vector as sentence-transformers computes it: pooled, then of length 1."""
    ids = torch.tensor([token_ids])
    with torch.inference_mode():
        states = model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].float()
    vector = {"mean": states.mean(dim=0), "cls": states[0], "last": states[-1]}[pooling]
    numbers: list[float] = torch.nn.functional.normalize(vector, dim=0).tolist()
    return numbers
