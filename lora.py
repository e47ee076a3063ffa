"""LoRA: stage 3 of moving a diffusion transformer to another autoencoder.

What    python lora.py, after python align.py. Trains a low-rank addition to the linear layers of
        the blocks, with the aligned embedder and head, until pictures are the base's again.
Why     After alignment alone the paper's models draw the right subject, coarsely; the toy draws
        blobs. The blocks still expect features of the old latents. They have to move a little and
        must not forget. A low-rank update limits how they can move, and leaves the base's weights
        as they are.
How     y = W x + b + alpha / r * B (A x),   A (r, in) random, B (out, r) zero                  (4)
        so training starts at the aligned model. The loss is align.py's: flow matching on the
        velocity recovered from the guidance-distilled model, align.py eq. (2) and (3). Loading
        merges the update (models/weights.py),
            W' = W + alpha / r * B A,                                                          (5)
        into a plain transformer again: it costs nothing when sampling.
Again   --model may have moved already: runs/x/lora.safetensors, an export, a DC-Gen model of the
        authors. Its LoRA is merged, and a fresh one is trained on top, with embedder and head as
        they are; the result holds both. So the authors train FLUX at 512 x 512, then at 1024.
Cost    The toy: ten minutes on two CPU cores. FLUX.1 (12 B) at 1024 x 1024: 48 GiB of a GPU.
Saves   runs/<model>/lora.safetensors: A and B of each layer, embedder and head; a --model of
        sample.py. --export writes what other programs open.
Source  DC-Gen, arXiv 2509.25180 (rank 256, alpha 256 for FLUX); LoRA, arXiv 2106.09685.
Differs The modulation layers (27% of FLUX's weights, one row a picture) get no LoRA, as in the
        authors' code. On the toy, embedder and head learn at three times --lr.
Limits  What the data does not show is forgotten in the end, low rank or not: see models/toy.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sample
from align import (
    ADAMW,
    CLIP,
    check_disk,
    cosine,
    draw_batch,
    flow_loss,
    held_out_loss,
    takes_guidance,
    trained,
    watcher,
)
from models import data, export, registry, runs, text, toy, weights
from models.data import Dataset
from models.flux import Flux, Modulation
from models.identity import placed
from models.registry import Spec
from models.script import Files, UserError, exit_cleanly, parse_config


@dataclass(frozen=True)
class Config:
    model: str = "flux-toy"  # the base: a name in registry.MODELS or a path; or a moved model
    aligned: str = ""  # align.py's file; "": runs/<model>/align.safetensors
    adapter: Files = ""  # FILE[:scale], merged into the base, as aligned; may be repeated
    data: str = ""  # images with same-stem .txt captions; "": what align.py saw
    weights: str = ""  # a folder to look in instead of the hub
    resolution: int = 0  # pixels, height = width; 0: as aligned
    rank: int = 64  # of each LoRA
    ablation: str = ""  # full: train all weights instead; plain: flow matching without eq. (3)
    steps: int = 3000
    lr: float = 4e-3  # cosine to zero; at 2e-2 the toy diverges
    batch_size: int = 32  # of all GPUs together
    micro_batch: int = 0  # pictures a GPU takes at once; 0: its share of the batch
    ema: float = 0.0  # decay of a moving average, e.g. 0.999, which is then what is saved; 0: none
    per_task: int = 12  # toy prompts of each task to score by; 0: none
    save_every: int = 100  # steps, so that an interrupted run goes on
    export: str = ""  # no training, a finished run for diffusers | peft | comfyui | comfyui-fp8
    seed: int = 0
    device: str = ""  # "": cuda, then mps, then cpu
    dtype: str = ""  # of frozen weights and encoders: fp32, bf16; "": fp32 for toys and on a CPU
    out: str = ""  # "": runs/<model>, of a moved one runs/<model>-2


# For official models, unless flags say otherwise. The rank is the paper's, the rest is customary.
LARGE = dict(rank=256, steps=10_000, lr=1e-4, micro_batch=2, save_every=500)
HEAD_SCALE = 3.0  # learning rate of embedder and head over --lr, on the toy
FIRST_BATCH = 500_000  # stage 2 has the batches before, and no seed shares one with the next


# ---- model


class LoRALinear(nn.Module):
    """eq. (4) around a frozen linear layer, whose parameters keep their names."""

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float):
        super().__init__()
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / rank
        out_features, in_features = base.weight.shape[:2]
        like = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Parameter(torch.randn(rank, in_features, **like) / in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, **like))

    def forward(self, hidden: Tensor) -> Tensor:  # (..., in) -> (..., out)
        # The scale is a factor of the small matrix, not of all tokens.
        down, up = self.lora_A.to(hidden.dtype), (self.scale * self.lora_B).to(hidden.dtype)
        update = F.linear(F.linear(hidden, down), up)
        return F.linear(hidden, self.weight, self.bias) + update


class LoRAConv(LoRALinear):
    """The same around a 1x1 convolution, a linear layer for each pixel: SANA's MLPs."""

    def forward(self, image: Tensor) -> Tensor:  # (B, in, h, w) -> (B, out, h, w)
        halves = (self.lora_A, self.scale * self.lora_B)
        down, up = (half.to(image.dtype)[..., None, None] for half in halves)
        update = F.conv2d(F.conv2d(image, down), up)
        return F.conv2d(image, self.weight, self.bias) + update


def add_lora(model: nn.Module, rank: int, alpha: float) -> None:
    """eq. (4) for every linear layer of the blocks but FLUX's modulations."""
    for block in model.blocks:
        modulations = [m.lin for m in block.modules() if isinstance(m, Modulation)]
        for path, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear) and layer not in modulations:
                wrapped = LoRALinear(layer, rank, alpha)
            elif isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
                wrapped = LoRAConv(layer, rank, alpha)
            else:
                continue
            parent, _, name = path.rpartition(".")
            setattr(block.get_submodule(parent), name, wrapped)


def choose_trained(model: nn.Module, config: Config) -> None:
    """LoRA (or all weights), the embedder and the head are trained, all else is frozen."""
    if config.ablation == "full":
        model.requires_grad_(True).float()  # in bf16 a small step is no step
        return
    model.requires_grad_(False)
    add_lora(model, config.rank, alpha=config.rank)
    model.embedder.requires_grad_(True)
    model.head.linear.requires_grad_(True)


def joined(first: weights.Checkpoint, second: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one LoRA that adds what two add, after a run `first` was trained further.

    B1 A1 + B2 A2 = [B1 B2] [A1; A2], so a model that was trained twice is its base and one file.
    """
    tensors = {name: first.get(name) for name in first.shapes} | second
    for name in first.shapes:
        if name.endswith("lora_A"):
            up = name.removesuffix("A") + "B"
            scale = first.alpha / first.shapes[name][0]
            tensors[name] = torch.cat([first.get(name), second[name]])
            tensors[up] = torch.cat([scale * first.get(up), second[up]], 1)
    return tensors


# ---- train


def groups(model: nn.Module, spec: Spec) -> list[dict]:
    """AdamW's groups: blocks, then embedder and head, which on the toy have further to go."""
    outer = [*model.embedder.parameters(), *model.head.linear.parameters()]
    inner = [p for p in trained(model).values() if not any(p is other for other in outer)]
    scale = HEAD_SCALE if spec.is_toy else 1.0  # of the learning rate
    return [{"params": inner, "scale": 1.0}, {"params": outer, "scale": scale}]


def train(
    model: nn.Module,
    pictures: Dataset,
    config: Config,
    spec: Spec,
    watch: Callable[[runs.Run], None] | None = None,  # called five times on the way
) -> list[tuple[int, float]]:
    """Stage 3, by eq. (2) of align.py. Returns the learning curve: (step, held-out loss)."""
    parameters = [*trained(model).values()]
    optimizer = torch.optim.AdamW(groups(model, spec), **ADAMW, fused=parameters[0].is_cuda)
    run = runs.Run("lora", trained(model), optimizer, config, pictures.key)
    recover = takes_guidance(model) and config.ablation != "plain"
    loss_of = runs.compiled(flow_loss, config, run.device, spec.is_toy)
    batch_of = data.ahead(
        lambda step: draw_batch(pictures, config, spec, FIRST_BATCH + step), run.device
    )
    for step in run.steps(config.steps):  # goes on where an earlier process stopped
        if watch and step % max(config.steps // 5, 1) == 0:
            watch(run)
        batch = batch_of(step)
        loss = torch.zeros((), device=run.device)
        for part, weight in batch.split(config.micro_batch, run.device):
            with runs.autocast(model):
                part_loss = weight * loss_of(model, part, recover)  # eq. (2), (3)
            part_loss.backward()
            loss += part_loss.detach()
        runs.sum_over_gpus(loss, parameters)
        norm = nn.utils.clip_grad_norm_(parameters, CLIP)
        lr = cosine(step, config.steps, config.lr)
        if run.is_finite(loss, norm, pictures.names_of(batch.rows)):  # else the step is skipped
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            optimizer.step()
            run.update_average()  # where --ema is given
        optimizer.zero_grad()
        run.log(loss=loss, lr=lr, norm=norm)
    run.done()
    last = held_out_loss(model, pictures, config, spec)
    return [*run.curve("held_out"), (config.steps, last)]


# ---- main


def main() -> None:
    def defaults(model: str) -> dict:
        return {} if registry.describe(model).is_toy else LARGE

    config = parse_config(Config, __doc__, defaults=defaults)
    config = replace(config, out=str(runs.folder_of(config, trains=not config.export)))
    if config.export:
        return export_run(config)
    if config.ablation not in ("", "full", "plain"):
        raise UserError(f"--ablation {config.ablation!r}: wanted full or plain")
    device = runs.start(config.device)
    start = config.model if is_moved(config) else str(find_aligned(config))
    with runs.locked(Path(config.out)):
        finetune(config, start, device)
    runs.finish()


def is_moved(config: Config) -> bool:
    """Has --model its new latent space already? UserError: it cannot be trained further."""
    spec, model, _ = sample.load_pipeline(config.model, "", config.weights, "meta")
    own = 16 if isinstance(model, Flux) else 32  # channels of the latents that FLUX, SANA came with
    moved = spec.stage in ("lora", "merged") or model.latent_channels != own
    if moved and config.aligned:
        raise UserError(f"--aligned and {config.model}, which is moved already: leave one out")
    if spec.stage in ("align", "quant") or spec.schedule == "anyflow":
        raise UserError(f"--model {config.model}: wanted a base, or a moved model that can train")
    return moved


def find_aligned(config: Config) -> Path:
    """align.py's file. UserError: there is none, or it is of another base."""
    path = Path(config.aligned or f"{config.out}/align.safetensors")
    if not path.exists():
        raise UserError(f"{path} is missing: run `python align.py {runs.same_flags(config)}`")
    header = weights.open_checkpoint(path).metadata
    if header.get("stage") != "align":
        raise UserError(f"{path} is no file of align.py (stage {header.get('stage')!r})")
    if placed(header["base"]) != registry.describe(config.model).transformer:
        raise UserError(
            f"{path} was aligned for {header['base']}, --model is {config.model}: align that "
            f"model first"
        )
    return path


def load_start(
    start: str, folder: str, device: torch.device, dtype: torch.dtype, adapter: str = ""
) -> tuple[Spec, nn.Module, nn.Module]:
    """(Spec, transformer, autoencoder). Embedder and head are trained, so they are in fp32."""
    spec, model, autoencoder = sample.load_pipeline(start, "", folder, device, dtype, adapter)
    model.embedder.float()
    model.head.linear.float()
    if spec.stage in ("align", "lora"):  # as they were trained, which `dtype` may have rounded
        checkpoint = registry.open_run(spec, folder)
        for part in (model.embedder, model.head.linear):
            names = {id(p): name for name, p in model.named_parameters()}
            for p in part.parameters():
                p.data.copy_(checkpoint.get(names[id(p)]))
    return spec, model, autoencoder


def open_start(config: Config, start: str) -> tuple[Spec, weights.Checkpoint | None]:
    """What training starts from: its Spec, and its file if it is a run of ours."""
    spec = registry.describe(start)
    run = registry.open_run(spec, config.weights) if spec.stage in ("align", "lora") else None
    if run and (below := run.metadata.get("adapters", "")) != config.adapter:
        raise UserError(f"{run.path} stands on --adapter {below!r}, not {config.adapter!r}")
    return replace(spec, size=config.resolution or spec.size), run


def find_pictures(
    config: Config, start: str, device: torch.device, dtype: torch.dtype
) -> tuple[Dataset, str, dict[str, str]]:
    """(the pictures, their folder, what the header of the result says of its origin).

    All that can be refused without the weights is refused here.
    """
    spec, run = open_start(config, start)
    out, header = Path(config.out), run.metadata if run else {}
    _, model, autoencoder = sample.load_pipeline(start, "", config.weights, "meta")
    runs.check_flags(config, spec.size, [autoencoder.stride])
    if config.ablation == "plain" and not takes_guidance(model):
        raise UserError(f"--ablation plain: {config.model} has no guidance that eq. (3) undoes")
    choose_trained(model, config)
    count = sum(p.numel() for p in trained(model).values())
    files = sample.open_parts(spec, config.weights)
    notes = dict(autoencoder_digest=files[1].digest)
    base = header.get("base_digest") if run else files[0].digest
    notes |= {"base_digest": base} if base else {}  # older runs do not know it
    runs.is_done(out / "lora.safetensors", config, notes)  # another's result is refused at once
    flags = weights.parse_json(header.get("command", "{}"), f"the command of {start}")
    folder = config.data or flags.get("data")
    if not folder:
        raise UserError("--data is missing: wanted a folder of pictures with captions")
    encoder = sample.latent_encoder(spec.autoencoder, config.weights, device, dtype)
    source = data.open_source(folder, spec.size, autoencoder.stride, out)
    check_disk(out, source, model, [autoencoder], spec, dtype, count)
    pictures = data.prepare(source, [encoder], spec, config, device, dtype)
    # What the progress files of this run are known by.
    notes["origin"] = data.digest(pictures.key, files[0].digest)
    return replace(pictures, key=notes["origin"]), folder, notes


def finetune(config: Config, start: str, device: torch.device) -> None:
    """start: align.py's file, or a moved model."""
    torch.manual_seed(config.seed)
    spec, run = open_start(config, start)
    dtype, out = runs.frozen_dtype(config.dtype, device, spec.is_toy), Path(config.out)
    pictures, folder, notes = find_pictures(config, start, device, dtype)
    saved = out / "lora.safetensors"
    if runs.is_done(saved, config, notes):
        return

    adapter = "" if run else config.adapter  # a run names its own
    _, model, autoencoder = load_start(start, config.weights, device, dtype, adapter)
    choose_trained(model, config)
    runs.ready_blocks(model.blocks, device, spec.is_toy)
    kind = "all weights" if config.ablation == "full" else f"rank {config.rank}"
    print(
        f"lora | {config.model} -> {spec.autoencoder} | {kind}, {runs.memory(model, config)} | "
        f"{len(pictures)} pictures | seed {config.seed} | {device}"
    )
    watch = watcher(model, autoencoder, spec, pictures, config)
    curve = train(model, pictures, config, spec, watch)

    tensors = {name: p.to(dtype) for name, p in trained(model).items()}
    if spec.stage == "lora" and config.ablation != "full":
        tensors = joined(run, tensors)
    # A run's file names the base, and adds its own facts.
    own = dict(autoencoder=spec.autoencoder, schedule=spec.schedule, shift=spec.shift)
    base = run.metadata["base"] if run else start
    base_spec = replace(registry.describe(base), size=spec.size, **own)
    told = replace(config, data=placed(folder))
    notes |= runs.header(told, "lora", base_spec, model, config.steps)
    alpha = max((len(t) for name, t in tensors.items() if name.endswith("lora_A")), default=1)
    runs.save_last(saved, tensors, notes | {"alpha": str(float(alpha))})
    if runs.rank() > 0:
        return
    name = "+ full" if config.ablation == "full" else "+ LoRA"
    models = {name: (spec, model, autoencoder)}
    if spec.is_toy and config.per_task:  # loaded as a user will
        before = {"base": config.model, "aligned": start}
        paths = (before if spec.stage == "align" else {"before": start}) | {name: str(saved)}
        below = {"base": config.adapter, "before": adapter}
        how = ("", config.weights, device, torch.float32)
        models = {n: sample.load_pipeline(p, *how, below.get(n, "")) for n, p in paths.items()}
    scores, images, captions = sample.show_and_score(models, config.per_task, pictures)
    sample.save_sheet(out / "lora.png", images, captions)
    files = [str(saved), str(out / "lora.png")]
    rows = "\n".join(f"{step:5d}  {loss:.3f}" for step, loss in curve)
    print(f"\nstep  held-out flow loss\n{rows}")
    toy.print_scores(scores)
    print(f"\nsaved  {'  '.join(files)}\nnext   python sample.py --model {quote(str(saved))}")
    print(json.dumps(dict(stage="lora", curve=curve, scores=scores, files=files)))
    runs.delete_progress(saved)


def export_run(config: Config) -> None:
    """Write what --export names, beside the run."""
    saved = Path(config.out) / "lora.safetensors"
    if not saved.exists():
        raise UserError(f"{saved} is missing: run `python lora.py {runs.same_flags(config)}`")
    kind, folder = config.export, Path(config.out) / config.export
    spec = registry.describe(str(saved))
    dtype = runs.frozen_dtype(config.dtype or ("" if spec.is_toy else "bf16"), torch.device("cpu"))
    _, *models = sample.load_pipeline(str(saved), "", config.weights, "cpu", dtype)
    if spec.schedule != "flux" or kind.startswith("comfyui"):  # they follow no size: the run's
        model, autoencoder = models
        tokens = (spec.size // autoencoder.stride) ** 2
        spec = replace(spec, shift=sample.shift_of(spec, tokens, model.latent_channels))
    files = export.write(kind, spec, *models, folder)
    base = text.source_of(spec, config.weights)
    print(export.how_to(kind, spec, *models, base, folder))
    print("saved  " + "  ".join(map(str, files)))
    facts = dict(autoencoder=spec.autoencoder, shift=spec.shift, size=spec.size)
    figures = dict(stage="export", kind=kind, files=[str(file) for file in files])
    print(json.dumps(figures | facts))


if __name__ == "__main__":
    exit_cleanly(main)
