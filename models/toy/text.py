"""The toy world's text encoder, trained with the toy FLUX; an interface as in models/text.py."""

import re

import torch
from torch import Tensor, nn

from models import weights
from models.script import UserError
from models.weights import Device

PRESETS = {"text-toy": dict(path="models/toy/text.safetensors")}


class ToyText(nn.Module):
    """A small transformer over a closed vocabulary, trained together with the toy FLUX."""

    def __init__(  # the vocabulary is "<pad>", "<bos>", then the words
        self,
        vocabulary: list[str],
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        length: int = 16,
    ):
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config, self.vocabulary, self.length = config, vocabulary, length
        # On the CPU, as drawing on "meta" loads torch's compiler for seconds; by a generator
        # of its own, as building one leaves the caller's random numbers alone.
        how = dict(device="cpu", generator=torch.Generator("cpu").manual_seed(0))
        words = torch.randn(len(vocabulary), width, **how)
        self.words = nn.Embedding.from_pretrained(words, freeze=False)
        self.positions = nn.Parameter(torch.randn(length, width, **how) * 0.02)
        kind = dict(activation="gelu", dropout=0.0, batch_first=True, norm_first=True)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, **kind)
        norm = nn.LayerNorm(width)
        self.blocks = nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, L) -> text (B, L, D), zero where padded, and its mean over words (B, D)."""
        padded = tokens == 0  # (B, L)
        hidden = self.words(tokens) + self.positions  # (B, L, D)
        hidden = self.blocks(hidden, src_key_padding_mask=padded)
        text = hidden.masked_fill(padded[..., None], 0.0)  # (B, L, D)
        return text, text.sum(1) / (~padded).sum(1, keepdim=True)  # "<bos>" is always there

    def tokenize(self, prompts: list[str]) -> Tensor:
        """(B, L): "<bos>", one token a word, then "<pad>". Case and punctuation are ignored."""
        tokens = torch.zeros(len(prompts), self.length, dtype=torch.long)
        for row, prompt in zip(tokens, prompts):
            words = re.findall(r"\w+", prompt.lower())
            if unknown := [word for word in words if word not in self.vocabulary]:
                known = " ".join(self.vocabulary[2:])
                raise UserError(f"the toy world has no word {unknown[0]!r}; it knows: {known}")
            if len(words) >= self.length:
                limit = f"at most {self.length - 1} words"
                raise UserError(f"the toy world takes {limit}; {prompt!r} has {len(words)}")
            row[: len(words) + 1] = torch.tensor([1, *map(self.vocabulary.index, words)])
        return tokens

    def encode(self, prompts: list[str], negative: bool = False) -> tuple[Tensor, Tensor]:
        """Prompts -> (text, pooled_text); the empty prompt is the unconditional one."""
        return self(self.tokenize(prompts).to(self.positions.device))

    @classmethod
    def from_pretrained(
        cls, source: str = "text-toy", device: Device = "cpu", dtype: torch.dtype = torch.float32
    ) -> "ToyText":
        checkpoint, config, _ = weights.open_model(source, PRESETS)
        model = weights.build(cls, config, checkpoint.path)
        rows = {name: ((name,), None) for name in model.state_dict()}
        weights.assign(model, rows, checkpoint, device, dtype)
        return model.eval().requires_grad_(False)


class SanaToyText(ToyText):
    """The same encoder for the toy SANA, which takes the words' mask, not their mean."""

    def encode(self, prompts: list[str], negative: bool = False) -> tuple[Tensor, Tensor]:
        """Prompts -> (text, text_mask); the empty prompt is the unconditional one."""
        tokens = self.tokenize(prompts).to(self.positions.device)
        return self(tokens)[0], tokens != 0
