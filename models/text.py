"""Prompts to conditioning.

A text encoder returns the tuple `cond` that its transformer takes after the timestep:
    toy, FLUX   text (B, L, D), pooled_text (B, D')
    SANA        text (B, L, D), text_mask (B, L), True where a token is real
"""

import re

import torch
from torch import Tensor, nn

from models import weights
from models.weights import UserError

PRESETS = {"toy": dict(path="models/toy/text.safetensors")}

# ---- the toy world's encoder


class ToyText(nn.Module):
    """A small transformer over a closed vocabulary, trained together with the toy base."""

    def __init__(
        self,
        vocabulary: list[str],
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        length: int = 16,
    ):
        super().__init__()
        assert vocabulary[:2] == ["<pad>", "<bos>"], f"vocabulary begins with {vocabulary[:2]}"
        self.config = dict(
            vocabulary=list(vocabulary), width=width, layers=layers, heads=heads, length=length
        )
        self.vocabulary, self.length = list(vocabulary), length
        self.words = nn.Embedding(len(vocabulary), width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width,
            heads,
            4 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(
            layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, L) -> text (B, L, D), zero where padded, and its mean over words (B, D)."""
        padded = tokens == 0  # (B, L)
        hidden = self.words(tokens) + self.positions  # (B, L, D)
        hidden = self.blocks(hidden, src_key_padding_mask=padded)
        text = hidden.masked_fill(padded[..., None], 0.0)  # (B, L, D)
        return text, text.sum(1) / (~padded).sum(1, keepdim=True)  # "<bos>" is always there

    def tokenize(self, prompts: list[str]) -> Tensor:
        """(B, L): "<bos>", one token a word, then "<pad>". Case and punctuation do not count."""
        tokens = torch.zeros(len(prompts), self.length, dtype=torch.long)
        index = {word: i for i, word in enumerate(self.vocabulary)}
        for row, prompt in zip(tokens, prompts):
            words = re.findall(r"\w+", prompt.lower())
            for word in words:
                if word not in index:
                    known = " ".join(self.vocabulary[2:])
                    raise UserError(f"the toy world has no word {word!r}; it knows: {known}")
            if len(words) >= self.length:
                raise UserError(
                    f"the toy world takes prompts of at most {self.length - 1} words; "
                    f"this one has {len(words)}: {prompt!r}"
                )
            row[: len(words) + 1] = torch.tensor([1] + [index[word] for word in words])
        return tokens

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> (text, pooled_text); the empty prompt is the unconditional one."""
        return self(self.tokenize(prompts).to(self.positions.device))

    @classmethod
    def from_pretrained(
        cls,
        path_or_preset: str = "toy",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "ToyText":
        path, _ = weights.locate(path_or_preset, PRESETS)
        checkpoint = weights.open_checkpoint(path, None)
        with torch.device("meta"):
            model = cls(**checkpoint.config)
        rows = {name: ((name,), None) for name in model.state_dict()}
        weights.assign(model, rows, checkpoint, device=device, dtype=dtype)
        return model.eval().requires_grad_(False)
