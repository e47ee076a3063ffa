"""Prompts to conditioning.

A text encoder turns prompts into `cond`, what its transformer takes after the timestep:
    FLUX   text (B, L, D), pooled_text (B, D')
    SANA   text (B, L, D), text_mask (B, L), True where a token is real
A GPU that holds the transformer has no room for the encoders (T5-XXL: 4.8 B parameters),
and prompts are few: `encode` loads an encoder, uses it and frees it.
"""

import gc
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from models import hub, weights
from models.registry import Spec
from models.script import UserError
from models.toy.text import SanaToyText, ToyText
from models.weights import Device

Cond = tuple[Tensor, ...]
Prompt = tuple[str, bool]  # and whether it is a negative one

PARTS = ["tokenizer*/*", "text_encoder*/*.json", "text_encoder*/*.safetensors"]  # of a pipeline

# SANA puts this before a prompt; its transformer sees Gemma's output for the prompt alone.
# The wording is part of the trained model (NVlabs/Sana, Apache 2.0; quotes as in diffusers).
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

# ---- from a file


def read_rows(path: Path, key: str) -> Iterator[tuple[str, dict]]:
    """(where, row) of each line that is not blank: a JSON object with that key, or a .txt line."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where, line = f"{path} line {number}", line.removesuffix("\r")
        try:
            row = {key: line} if path.suffix == ".txt" else json.loads(line)
            if not isinstance(row[key], str):
                raise TypeError
        except (ValueError, LookupError, TypeError, RecursionError):
            raise UserError(f'{where} is not like {{"{key}": "..."}}') from None
        yield where, row


def read_text(path: Path) -> str:
    """UTF-8, with or without a byte order mark, or the UTF-16 with one that Windows writes."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    is_wide = data[:2] in (b"\xff\xfe", b"\xfe\xff") and data[2:4] != b"\0\0"
    coding, at = "utf-16" if is_wide else "utf-8-sig", data.find(0)
    try:
        text = data.decode(coding)
        if is_wide or at < 0:  # zeros are those of UTF-16 or UTF-32 without a mark
            return text
    except UnicodeDecodeError as error:
        at = len(data) - len(error.object) + error.start  # utf-8-sig drops the mark
    line = data[:at].decode(coding, "ignore").count("\n") + 1
    found = f"byte {at} is 0x{data[at]:02x}, neither UTF-8 nor UTF-16 with a byte order mark"
    raise UserError(f"{path} line {line}: {found}: save it as UTF-8")


def whole(text: str) -> str:
    """Half a character (JSON can hold it) becomes "?"."""
    return text.encode(errors="replace").decode()


# ---- the encoders

TOYS = {"toy": ToyText, "sana-toy": SanaToyText}


class Reader:
    """A tokenizer and a model of a diffusers pipeline, its first ("") or its second ("_2")."""

    def __init__(self, kind: str, folder: Path, number: str, device: Device, dtype: torch.dtype):
        import transformers

        transformers.logging.set_verbosity_error()
        source, words = folder / f"text_encoder{number}", folder / f"tokenizer{number}"
        cls, how = getattr(transformers, kind), dict(dtype=dtype, output_loading_info=True)
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(words)
            checkpoint = weights.open_checkpoint(source)  # of any variant, sharded or not
            how["state_dict"] = {name: checkpoint.get(name) for name in checkpoint.shapes}
            how["config"] = cls.config_class.from_pretrained(source)
            model, report = cls.from_pretrained(None, **how)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            cause = "or its tokenizer does not load: pass a pipeline's folder, or --weights"
            raise UserError(f"{source} {cause} ({error!r:.200})") from error
        if missing := sorted(report["missing_keys"]):
            raise UserError(f"{source} lacks tensors of {kind}: {', '.join(missing[:5])}")
        self.tokenizer.padding_side = "right"
        self.model = model.to(device).eval().requires_grad_(False)
        self.kind, self.cut = kind, 0  # tokens over the limit, which the model does not see

    def tokenize(self, prompts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """tokens and mask, (B, length) each"""
        self.cut += sum(max(0, len(row) - length) for row in self.tokenizer(prompts).input_ids)
        how = dict(padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        padded = self.tokenizer(prompts, **how).to(self.model.device)
        return padded.input_ids, padded.attention_mask


class FluxText:
    """T5 gives one vector for each token of the prompt, CLIP one vector for all of it."""

    def __init__(self, folder: Path, device: Device, dtype: torch.dtype, length: int):
        self.clip = Reader("CLIPTextModel", folder, "", device, dtype)
        self.t5 = Reader("T5EncoderModel", folder, "_2", device, dtype)
        self.readers, self.length = (self.clip, self.t5), length

    def encode(self, prompts: list[str], negative: bool = False) -> Cond:
        """text (B, 512, 4096), pooled_text (B, 768). Unconditional is the empty prompt."""
        clip_tokens, _ = self.clip.tokenize(prompts, 77)
        t5_tokens, _ = self.t5.tokenize(prompts, self.length)  # no mask: FLUX sees the padding
        return self.t5.model(t5_tokens)[0], self.clip.model(clip_tokens).pooler_output


class SanaText:
    """Gemma-2, a chat model, reads the prompt after an instruction to enhance it."""

    def __init__(self, folder: Path, device: Device, dtype: torch.dtype, length: int = 300):
        self.gemma = Reader("Gemma2Model", folder, "", device, dtype)
        self.readers, self.length = (self.gemma,), length

    def encode(self, prompts: list[str], negative: bool = False) -> Cond:
        """text (B, 300, 2304), text_mask (B, 300). A negative prompt has no instruction."""
        prompts, length = [prompt.lower().strip() for prompt in prompts], self.length
        if not negative:
            prompts = [INSTRUCTION + prompt for prompt in prompts]
            # The instruction's own tokens, but for the first one and the trailing space.
            length += len(self.gemma.tokenizer.encode(INSTRUCTION)) - 2
        tokens, mask = self.gemma.tokenize(prompts, length)
        hidden = self.gemma.model(tokens, attention_mask=mask, use_cache=False)[0]
        kept = [0, *range(1 - self.length, 0)]  # the first token, the prompt, its padding
        return hidden[:, kept], mask[:, kept].bool()


@torch.no_grad()
def source_of(spec: Spec, folder: str) -> str:
    """Where the text encoders are: a pipeline on the hub, or in the user's --weights folder."""
    if folder and not spec.is_toy and not Path(spec.pipeline).exists():
        return str(hub.in_folder(Path(folder), {"hub": spec.pipeline}))
    return spec.pipeline


def encode(
    kind: str,  # toy | sana-toy | flux | schnell | sana
    source: str,  # of a toy: a file or a preset; else a pipeline's folder or hub id
    prompts: list[str],
    negatives: list[str] = (),  # SANA encodes these differently
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Cond, Cond]:
    """cond of `prompts` and of `negatives`, on the CPU."""
    pairs = [(prompt, False) for prompt in prompts] + [(prompt, True) for prompt in negatives]
    distinct = list(dict.fromkeys(pairs))
    encoded = dict(zip(distinct, list(encode_each(kind, source, distinct, device, dtype))))
    rows = [encoded[pair] for pair in pairs]
    positive, negative = zip(*rows[: len(prompts)]), zip(*rows[len(prompts) :])
    return tuple(map(torch.stack, positive)), tuple(map(torch.stack, negative))


@torch.no_grad()
def encode_each(
    kind: str, source: str, prompts: list[Prompt], device: Device, dtype: torch.dtype
) -> Iterator[Cond]:
    """cond of each prompt, without batch dimension; the encoder is freed at the end."""
    encoder = open_encoder(kind, source, torch.device(device), dtype)
    for prompt, negative in prompts:  # one at a time: no result depends on its neighbours
        yield tuple(output[0].cpu() for output in encoder.encode([prompt], negative))
    lost = {} if kind in TOYS else {reader.kind: reader.cut for reader in encoder.readers}
    if any(lost.values()):
        print(f"prompts over the limit: tokens not read by {lost}", file=sys.stderr)
    del encoder
    gc.collect()
    torch.cuda.empty_cache()


def open_encoder(kind: str, source: str, device: torch.device, dtype: torch.dtype):
    if kind in TOYS:
        return TOYS[kind].from_pretrained(source, device, dtype)
    folder = Path(source)
    if not folder.exists():
        for avoid in (hub.VARIANTS, []):  # as in hub.download_model
            folder = hub.download(source, PARTS, avoid)
            if all(any(part.glob("*.safetensors")) for part in folder.glob("text_encoder*")):
                break
    # fp16 ends at 65504, and activations of T5 and Gemma pass it.
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    if kind == "sana":
        return SanaText(folder, device, dtype)
    return FluxText(folder, device, dtype, length=256 if kind == "schnell" else 512)


def cache_keys(kind: str, source: str, dtype: torch.dtype, prompts: list[Prompt]) -> dict:
    """prompt -> key of its result, by all that it depends on; files by size and date."""
    files = [file for part in PARTS for file in Path(source).glob(part) if file.is_file()]
    facts = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    about = repr((kind, source, dtype, facts))
    return {p: hashlib.sha256(f"{about} {p!r}".encode()).hexdigest() for p in prompts}
