"""LoRA: stage 3 of moving a diffusion transformer to another autoencoder.

What    python lora.py, after python align.py. Trains a low-rank addition to every linear layer
        of the blocks, with the aligned embedder and head, until pictures are the base's again.
Why     Aligned doors alone give the right subject, coarsely: the blocks still work on features of
        the old latents' statistics. They need to move a little, and must not forget. A low-rank
        update moves them a little by construction, and leaves the base's weights as they are.
How     y = W x + b + alpha / r * B (A x),   A (r, in) random, B (out, r) zero                  (1)
        so training starts at the aligned model. The loss is align.py's: flow matching on the
        velocity recovered from the guidance-distilled model, align.py eq. (2) and (3). Merging,
            W' = W + alpha / r * B A,                                                          (2)
        gives a plain transformer again: no cost when sampling.
Cost    The toy: see the README.
Source  DC-Gen, arXiv 2509.25180 (rank 256, alpha 256 for FLUX); LoRA, arXiv 2106.09685.
Differs The modulation layers (27% of FLUX's weights, one row a picture) get no LoRA.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import sample
from align import (
    cosine,
    doors,
    draw_batch,
    flow_loss,
    header,
    held_out_loss,
    load_progress,
    open_source,
    prepare,
    print_scores,
    save_progress,
    show_and_score,
    trained,
    transplant,
)  # fmt: skip
from models import weights
from models.flux import Flux
from models.weights import UserError


@dataclass(frozen=True)
class Config:
    model: str = "flux-toy"  # the base: a name in sample.MODELS or a path
    aligned: str = ""  # align.py's file; "": runs/<model>/align.safetensors; none: fresh doors
    autoencoder: str = "dc-ae-f32c32-toy"  # only for --aligned none: else the file tells
    data: str = ""  # a folder of images with same-stem .txt captions; "": the toy world
    weights: str = ""  # a folder to look in instead of the hub
    resolution: int = 0  # pixels, height = width; 0: the model's own
    scenes: int = 3072  # toy pictures to draw when there is no data
    rank: int = 64  # of each LoRA
    alpha: float = 64.0  # scale of the update is alpha / rank
    full: bool = False  # train every weight of the blocks instead: forgets more
    recover: bool = True  # eq. (3) of align.py; --no-recover: plain flow matching
    steps: int = 900
    lr: float = 2e-3  # cosine to zero
    batch_size: int = 32
    guidance_max: float = 5.0  # guidance is drawn from [1, this]
    dropout: float = 0.1  # share of captions emptied
    per_task: int = 12  # toy prompts of each task to score by; 0: none
    save_every: int = 100  # steps, so that an interrupted run goes on
    compile: bool = False  # for a GPU: some 40 s once, then shorter steps
    seed: int = 0
    device: str = ""  # "": cuda, then mps, then cpu
    out: str = ""  # "": runs/<model>


# ---- model


class LoRALinear(nn.Module):
    """eq. (1) around a frozen linear layer, whose parameters keep their names."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / rank
        like = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Parameter(
            torch.randn(rank, base.in_features, **like) / base.in_features**0.5
        )
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **like))

    def forward(self, hidden: Tensor) -> Tensor:  # (..., in) -> (..., out)
        update = F.linear(
            F.linear(hidden, self.lora_A.to(hidden.dtype)), self.lora_B.to(hidden.dtype)
        )
        return F.linear(hidden, self.weight, self.bias) + self.scale * update

    def merged(self) -> nn.Linear:
        """eq. (2), summed in fp32: a small update would drown in a bf16 sum."""
        linear = nn.Linear(*self.weight.shape[::-1], bias=self.bias is not None, device="meta")
        weight = self.weight.float() + self.scale * self.lora_B @ self.lora_A
        linear.weight, linear.bias = (nn.Parameter(weight.to(self.weight.dtype)), self.bias)
        return linear


def replace_linears(model: nn.Module, kind: type, make) -> None:
    """Every layer of `kind` inside the blocks, but the modulations, becomes make(layer)."""
    for block in (*model.double_blocks, *model.single_blocks):
        for path, module in list(block.named_modules()):
            if isinstance(module, kind) and "mod" not in path:
                parent, _, name = path.rpartition(".")
                setattr(block.get_submodule(parent), name, make(module))


def add_lora(model: nn.Module, rank: int, alpha: float) -> None:
    replace_linears(model, nn.Linear, lambda linear: LoRALinear(linear, rank, alpha))


def merge_lora(model: nn.Module) -> None:
    replace_linears(model, LoRALinear, LoRALinear.merged)


def choose_trained(model: nn.Module, config: Config) -> None:
    """Freeze by name, in the open: LoRA (or all of the blocks) and the two doors are trained."""
    model.requires_grad_(config.full)
    if not config.full:
        add_lora(model, config.rank, config.alpha)
    for door in doors(model):
        door.requires_grad_(True)


# ---- train


def train(model: nn.Module, pictures, config: Config, shift: float, device, progress: Path) -> list:
    """Stage 3. Returns rows of the learning curve: (step, held-out loss)."""
    parameters = list(trained(model).values())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0)
    first = load_progress(progress, model, optimizer, config)
    recover = config.recover and model.config["guidance_embeds"]
    forward = torch.compile(model) if config.compile else model
    curve = []
    bar = tqdm(range(first, config.steps), "lora", initial=first, total=config.steps)
    for step in bar:
        if step % max(config.steps // 5, 1) == 0:
            curve.append((step, held_out_loss(model, pictures, config, shift, device)))
        batch = draw_batch(pictures, config, shift, 1_000_000 + step, device)

        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = flow_loss(forward, batch, recover)  # align.py eq. (2), (3)

        for group in optimizer.param_groups:
            group["lr"] = cosine(step, config.steps, config.lr)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", lr=f"{group['lr']:.1e}", refresh=False)
        if (step + 1) % config.save_every == 0:
            save_progress(progress, model, optimizer, config, step + 1)
    return [*curve, (config.steps, held_out_loss(model, pictures, config, shift, device))]


# ---- main


def load_aligned(config: Config, out: Path, base: Flux, device) -> tuple[Flux, str, float]:
    """The model to go on from, its autoencoder and its timestep shift, all from align.py's file."""
    if config.aligned == "none":
        autoencoder = sample.load_autoencoder(
            config.autoencoder, config.weights, device, torch.float32
        )
        fresh = transplant(copy.deepcopy(base), autoencoder.latent_channels, 2)
        return fresh, config.autoencoder, 2.0
    path = Path(config.aligned or out / "align.safetensors")
    if not path.exists():
        raise UserError(f"{path} is missing: run `python align.py --model {config.model}` first")
    run = weights.open_checkpoint(path)
    if run.metadata.get("stage") != "align":
        raise UserError(f"{path} is no file of align.py (stage {run.metadata.get('stage')!r})")
    if run.metadata["base"] != config.model:
        raise UserError(
            f"{path} was aligned for {run.metadata['base']}, --model is {config.model}: "
            f"align that model first"
        )
    model = Flux.from_pretrained(path, device, weights=config.weights or None)
    return model, run.metadata["autoencoder"], float(run.metadata["shift"])


def main() -> None:
    config = weights.parse_config(Config, __doc__)
    device = weights.pick_device(config.device)
    torch.manual_seed(config.seed)
    out = Path(config.out or f"runs/{Path(config.model).stem}")
    spec, base, base_autoencoder = sample.load_pipeline(config.model, "", config.weights, device)
    model, autoencoder_name, shift = load_aligned(config, out, base, device)
    autoencoder = sample.load_autoencoder(autoencoder_name, config.weights, device, torch.float32)
    source = open_source(config, config.resolution or spec["size"], device)
    pictures = prepare(config, spec, {autoencoder_name: autoencoder}, source, out, device)
    choose_trained(model, config)

    count = sum(p.numel() for p in trained(model).values()) / 1e6
    kind = "all weights" if config.full else f"rank {config.rank}"
    print(
        f"lora | {config.model} -> {autoencoder_name} | {kind}, {count:.2f} M trained | "
        f"{len(pictures)} pictures | seed {config.seed} | {device}"
    )
    curve = train(model, pictures, config, shift, device, out / "lora.progress.safetensors")

    saved = out / "lora.safetensors"
    notes = header(config, "lora", spec, autoencoder_name, model, shift, config.steps)
    weights.save(saved, trained(model), notes | {"alpha": str(config.alpha)})
    (out / "lora.progress.safetensors").unlink(missing_ok=True)
    model = Flux.from_pretrained(saved, device, weights=config.weights or None)  # as a user will

    contestants = {"base": (base, base_autoencoder, spec.get("shift"))}
    if config.aligned != "none":
        before = load_aligned(config, out, base, device)[0]
        contestants["aligned"] = (before, autoencoder, shift)
    contestants["+ LoRA" if not config.full else "+ full"] = (model, autoencoder, shift)
    scores, images, prompts = show_and_score(contestants, spec, config, device)
    files = [str(saved)]
    if images:
        files.append(str(out / "lora.png"))
        sample.contact_sheet(images, prompts).save(files[-1])

    print(
        "\nstep  held-out flow loss\n" + "\n".join(f"{step:5d}  {loss:.3f}" for step, loss in curve)
    )
    print_scores(scores)
    print(f"\nsaved  {'  '.join(files)}\nnext   python sample.py --model {saved}")
    print(json.dumps(dict(stage="lora", curve=curve, scores=scores, files=files)))


if __name__ == "__main__":
    weights.run(main)
