"""Prompts to conditioning.

A text encoder turns prompts into `cond`, the tuple that its transformer takes after the timestep:
    FLUX   text (B, L, D), pooled_text (B, D')
    SANA   text (B, L, D), text_mask (B, L), True where a token is real
The encoders are larger than what a GPU has left beside the transformer (T5-XXL: 4.8 B parameters),
and prompts are few: `encode` loads them, uses them, frees them, and can keep the results in a file.
"""

import gc
import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from models import weights
from models.script import UserError

Cond = tuple[Tensor, ...]

PARTS = ["tokenizer*/*", "text_encoder*/*.json", "text_encoder*/*.safetensors"]  # of a pipeline
PRESETS = {"text-toy": dict(path="models/toy/text.safetensors")}

# SANA puts this before a prompt, and shows its transformer what Gemma made of the prompt alone.
# The wording is part of the trained model (NVlabs/Sana, Apache 2.0; quotes as diffusers has them).
INSTRUCTION = """\
Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions \
suitable for image generation. Evaluate the level of detail in the user prompt:
- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and \
spatial relationships to create vivid and concrete scenes.
- If the prompt is already detailed, refine and enhance the existing details slightly without \
overcomplicating.
Here are examples of how to transform or refine prompts:
- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, \
sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.
- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring \
glowing street lamps, a diverse crowd of people in colorful clothing, and a double-decker bus \
passing by towering glass skyscrapers.
Please generate only the enhanced description for the prompt below and avoid including any \
additional commentary or evaluations:
User Prompt: """

# ---- the toy world's encoder


class ToyText(nn.Module):
    """A small transformer over a closed vocabulary, trained together with the toy FLUX."""

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
        self.cut = {}  # a prompt that is too long is an error here
        # Drawn on the CPU, whatever the device: on "meta" torch loads its compiler for that, for
        # seconds. And by itself: who loads a ToyText draws what they would have drawn without.
        how = dict(device="cpu", generator=torch.Generator("cpu").manual_seed(0))
        words = torch.randn(len(vocabulary), width, **how)
        self.words = nn.Embedding.from_pretrained(words, freeze=False)
        self.positions = nn.Parameter(torch.randn(length, width, **how) * 0.02)
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

    def encode(self, prompts: list[str], negative: bool = False) -> Cond:
        """Prompts -> (text, pooled_text); the empty prompt is the unconditional one."""
        return self(self.tokenize(prompts).to(self.positions.device))

    @classmethod
    def from_pretrained(
        cls,
        path_or_preset: str = "text-toy",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "ToyText":
        checkpoint, config, _ = weights.open_model(path_or_preset, PRESETS)
        model = weights.build(cls, config, checkpoint.path)
        rows = {name: ((name,), None) for name in model.state_dict()}
        weights.assign(model, rows, checkpoint, device=device, dtype=dtype)
        return model.eval().requires_grad_(False)


class SanaToyText(ToyText):
    """The same encoder for the toy SANA, which wants to know where the words end instead."""

    def encode(self, prompts: list[str], negative: bool = False) -> Cond:
        """Prompts -> (text, text_mask); the empty prompt is the unconditional one."""
        tokens = self.tokenize(prompts).to(self.positions.device)
        return self(tokens)[0], tokens != 0


TOYS = {"toy": ToyText, "sana-toy": SanaToyText}

# ---- the encoders of FLUX and SANA


def load_encoder(
    name: str, folder: Path, parts: tuple[str, str], device: torch.device, dtype: torch.dtype
) -> tuple:
    """(tokenizer, model) from two sub-folders of a diffusers pipeline."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / parts[0])
        # A pickle is refused, whatever it holds.
        model, report = getattr(transformers, name).from_pretrained(
            folder / parts[1], dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"cannot load {' and '.join(parts)} from {folder} ({reason}): fetch that pipeline "
            f"and pass its folder, or with --weights the folder it is in"
        ) from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:5])
        raise UserError(f"{folder / parts[1]} lacks tensors of {name}: {missing}")
    tokenizer.padding_side = "right"
    return tokenizer, model.to(device).eval().requires_grad_(False)


def tokenize(
    tokenizer, prompts: list[str], length: int, cut: dict[str, int], reader: str
) -> tuple[Tensor, Tensor]:
    """tokens and mask, (B, length) each; adds to `cut` how many tokens `reader` does not see."""
    lost = sum(max(0, len(row) - length) for row in tokenizer(prompts).input_ids)
    cut[reader] = cut.get(reader, 0) + lost
    padded = tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return padded.input_ids, padded.attention_mask


class FluxText:
    """T5 reads the prompt word by word; CLIP says in one vector what the picture is of."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, length: int = 512):
        clip, t5 = ("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")
        self.clip_tokenizer, self.clip = load_encoder("CLIPTextModel", folder, clip, device, dtype)
        self.t5_tokenizer, self.t5 = load_encoder("T5EncoderModel", folder, t5, device, dtype)
        self.clip_length = self.clip_tokenizer.model_max_length  # 77
        self.length = length  # 512; schnell was trained with 256
        self.cut = {}

    def encode(self, prompts: list[str], negative: bool = False) -> Cond:
        """text (B, 512, 4096), pooled_text (B, 768). The unconditional prompt is the empty one."""
        clip_tokens, _ = tokenize(self.clip_tokenizer, prompts, self.clip_length, self.cut, "CLIP")
        t5_tokens, _ = tokenize(self.t5_tokenizer, prompts, self.length, self.cut, "T5")
        pooled_text = self.clip(clip_tokens.to(self.clip.device)).pooler_output
        text = self.t5(t5_tokens.to(self.t5.device))[0]  # no mask: FLUX has the padding in sight
        return text, pooled_text


class SanaText:
    """Gemma-2, a chat model, reads the prompt after an instruction to picture it in detail."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, length: int = 300):
        parts = ("tokenizer", "text_encoder")
        self.tokenizer, self.gemma = load_encoder("Gemma2Model", folder, parts, device, dtype)
        self.length, self.cut = length, {}

    def encode(self, prompts: list[str], negative: bool = False) -> Cond:
        """text (B, 300, 2304), text_mask (B, 300). A negative prompt goes without instruction."""
        prompts, length = [prompt.lower().strip() for prompt in prompts], self.length
        if not negative:
            prompts = [INSTRUCTION + prompt for prompt in prompts]
            # The instruction's own tokens; two less, for the first token and the trailing space.
            length += len(self.tokenizer.encode(INSTRUCTION)) - 2
        tokens, mask = tokenize(self.tokenizer, prompts, length, self.cut, "Gemma")
        tokens, mask = tokens.to(self.gemma.device), mask.to(self.gemma.device)
        hidden = self.gemma(tokens, attention_mask=mask, use_cache=False)[0]  # (B, L, 2304)
        kept = [0, *range(1 - self.length, 0)]  # the first token, then the prompt and its padding
        return hidden[:, kept], mask[:, kept].bool()


# ---- load, encode, free


@torch.no_grad()
def encode(
    kind: str,
    source: str,
    prompts: list[str],
    negatives: list[str] = (),
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    cache: str | None = None,
) -> tuple[Cond, Cond]:
    """cond of `prompts` and of `negatives` (SANA's are encoded differently), on the CPU.

    kind: toy | sana-toy | flux | schnell | sana; source: a file or preset (toys), a pipeline folder
    or hub id.
    cache: a safetensors file of earlier results; the encoders are loaded for what it lacks only.
    """
    wanted = [(p, False) for p in prompts] + [(p, True) for p in negatives]
    keys = cache_keys(kind, source, dtype, wanted)
    cache = None if kind in TOYS else cache  # the toy's encoder is cheaper than a look-up
    known = {}
    if cache and Path(cache).exists():
        stored = weights.open_checkpoint(Path(cache), None)
        known = {name: stored.get(name) for name in stored.shapes}
    missing = [pair for pair in keys if f"{keys[pair]}.0" not in known]
    if missing:
        for outputs, pair in zip(encode_each(kind, source, missing, device, dtype), missing):
            for i, output in enumerate(outputs):
                known[f"{keys[pair]}.{i}"] = output
        if cache:
            weights.save(cache, known, {"stage": "text"})
    rows = [tuple(known[f"{keys[pair]}.{i}"] for i in range(2)) for pair in wanted]
    positive, rest = rows[: len(prompts)], rows[len(prompts) :]
    return tuple(map(torch.stack, zip(*positive))), tuple(map(torch.stack, zip(*rest)))


@torch.no_grad()
def encode_each(
    kind: str, source: str, prompts: list[tuple[str, bool]], device, dtype: torch.dtype
) -> Iterator[Cond]:
    """cond of each (prompt, is it negative), without batch dimension; the encoders are freed."""
    encoder = open_encoder(kind, source, torch.device(device), dtype)
    for prompt, negative in prompts:  # one at a time: no result depends on its neighbours
        yield tuple(output[0].cpu() for output in encoder.encode([prompt], negative))
    if any(encoder.cut.values()):
        lost = ", ".join(f"{reader} {count}" for reader, count in encoder.cut.items())
        print(f"prompts over the limit: tokens not read by {lost}", file=sys.stderr)
    del encoder
    gc.collect()
    torch.cuda.empty_cache()


def open_encoder(
    kind: str, source: str, device: torch.device, dtype: torch.dtype
) -> "ToyText | FluxText | SanaText":
    if kind in TOYS:
        return TOYS[kind].from_pretrained(source, device, dtype)
    folder = Path(source)
    if not folder.exists():
        folder = weights.download(source, PARTS, weights.VARIANTS)
    # fp16 ends at 65504, and activations of T5 and Gemma pass it.
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    if kind == "sana":
        return SanaText(folder, device, dtype)
    return FluxText(folder, device, dtype, length=256 if kind == "schnell" else 512)


def cache_keys(
    kind: str, source: str, dtype: torch.dtype, prompts: list[tuple[str, bool]]
) -> dict[tuple[str, bool], str]:
    """Names of results, by all that they depend on: a local encoder by its sizes and dates."""
    files = [file for part in PARTS for file in Path(source).glob(part) if file.is_file()]
    facts = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    about = repr((kind, source, dtype, facts))
    return {p: hashlib.sha256(f"{about} {p!r}".encode()).hexdigest() for p in prompts}
