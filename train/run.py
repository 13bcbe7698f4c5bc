"""From a job's folder to its result: scan, cache, train, write; whatever happens stands in status.json."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from kandinsky5_core.attention.nabla import resolve_attention
from kandinsky5_core.config import Variant
from kandinsky5_core.loading import DTYPES, ModelFiles, find_files, load_dit_of, load_text_of, load_vae_of
from kandinsky5_core.memory.apply import checkpoint_blocks
from kandinsky5_core.memory.quantized import quantize_blocks
from kandinsky5_core.pipeline import Models
from kandinsky5_core.weights.hashing import model_hash, sampled_hash
from kandinsky5_core.weights.lora import BASE_KEY, SAMPLES_KEY
from kandinsky5_core.weights.lora_tools import write_lora
from kandinsky5_core.weights.variants import VARIANT_KEY

from .checkpoint import Progress, average_of, list_checkpoints, write_tensors
from .config import JobConfig, to_dict
from .data.cache import Hashes, build_cache, encode_caption
from .data.dataset import Batches, EncodeText
from .data.scan import ScanReport, scan
from .jobs import CACHE, EXIT_CODES, RESULT, SCAN, Job, device_turn
from .loop import Objective, Stopped, check_distribution, fit
from .objectives.flow_matching import FlowMatching
from .objectives.strengths import AtStrengths
from .progress import JobWatcher, StopSignals
from .trainable import WithLora, lora_tensors
from .validation import Interrupted, Validation, prepare, sample_request

log = logging.getLogger(__name__)

LOCK_SECONDS = 5.0
PATIENCE = timedelta(hours=12)
STEPS_KEY, JOB_KEY = "kandinsky5.steps", "kandinsky5.job"


def run_job(job: Job) -> int:
    """Run, or go on with, the job; the process's exit code (0 done, 3 stopped, 1 failed)."""
    with StopSignals().listening() as signals:
        try:
            config = job.config()
            accelerator = make_accelerator(config)
        except ValueError as error:
            JobWatcher(job.folder, job=job).tell("failed", str(error))
            log.error("%s", error)
            return EXIT_CODES["failed"]
        watcher = JobWatcher(
            job.folder, job=job, signals=signals, device=accelerator.device, is_main=accelerator.is_main_process,
            every=config.validation.every,
        )  # fmt: skip
        if not accelerator.is_main_process:
            return _ended(watcher, lambda: _train(job, config, watcher, accelerator))
        with _lock(job):
            return _ended(watcher, lambda: _in_turn(job, config, watcher, accelerator))


def _in_turn(job: Job, config: JobConfig, watcher: JobWatcher, accelerator: Accelerator) -> Path:
    """Train once the device is free of other jobs."""
    device = config.device if ":" in config.device else str(accelerator.device)

    def waiting(message: str) -> None:
        if watcher.status.state != "waiting":
            watcher.tell("waiting", message)
        watcher.working(message)

    with device_turn(job, device, waiting):
        return _train(job, config, watcher, accelerator)


def _ended(watcher: JobWatcher, work: object) -> int:
    """Do the work and tell how it ended."""
    try:
        result = work()  # type: ignore[operator]
    except Stopped as stopped:
        watcher.tell("stopped", str(stopped), seconds_left=None)
        return EXIT_CODES["stopped"]
    except KeyboardInterrupt:
        watcher.tell("stopped", "ended at once by a second signal; resume goes on from the last checkpoint")
        return EXIT_CODES["stopped"]
    except torch.OutOfMemoryError as error:
        watcher.tell("failed", f"out of memory: {error}; {_less_memory()}")
        return EXIT_CODES["failed"]
    except Exception as error:
        log.exception("the job failed")
        watcher.tell("failed", str(error) or type(error).__name__, seconds_left=None)
        return EXIT_CODES["failed"]
    watcher.tell("done", f"written to {result}", result=str(result), seconds_left=0.0)
    return EXIT_CODES["done"]


def _less_memory() -> str:
    return "try gradient_checkpointing, base_weights 'int8', a smaller area, frame_budget or rank, or 'adamw8bit'"


def make_accelerator(config: JobConfig) -> Accelerator:
    """Where to compute, and with how many processes.

    Raises:
        ValueError: the device is not there, or accelerate is set up to shard weights.
    """
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device '{config.device}' is not available here; use 'auto' or 'cpu'")
    if config.threads:
        torch.set_num_threads(config.threads)
    on_cpu = config.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    # The others wait while the first process encodes or makes samples.
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    check_distribution(accelerator)
    return accelerator


@contextlib.contextmanager
def _lock(job: Job) -> Iterator[None]:
    """The job's lock; a watcher that is just looking holds it for a moment too."""
    end = time.monotonic() + LOCK_SECONDS
    while job.is_alive() and time.monotonic() < end:
        time.sleep(0.1)
    with job.locked():
        yield


def job_files(config: JobConfig) -> ModelFiles:
    """The model's files.

    Raises:
        ValueError: one is missing or is something else.
    """
    return find_files(
        config.model, text_encoder=config.text_encoder or None, clip=config.clip or None, vae=config.vae or None,
        tokenizers=config.tokenizers or None, variant_name=config.variant or None,
    )  # fmt: skip


def _train(job: Job, config: JobConfig, watcher: JobWatcher, accelerator: Accelerator) -> Path:
    watcher.tell("loading", "looking at the material", num_steps=config.fit.num_steps)
    files = job_files(config)
    report = scan(config.data, files.variant, on_item=watcher.working)
    log.info("%s", report.text())
    if accelerator.is_main_process:
        (job.folder / SCAN).write_text(report.text(), encoding="utf-8")
    report.check()
    setup = Setup(job=job, config=config, files=files, watcher=watcher, accelerator=accelerator)
    batches, held_out, models = setup.material(report)
    if config.only_cache:
        return Path(config.data.cache or job.folder / CACHE)
    model, models = setup.network(models)
    variant = files.variant
    objective = FlowMatching(
        batches, variant.rope_scale, distribution=config.flow.distribution,
        shift=config.flow.shift or variant.sampling.shift, nabla=setup.nabla(),
    )  # fmt: skip
    watcher.validation = Validation(
        models=models, samples=setup.samples, objective=objective, batches=held_out, folder=job.folder,
        check=setup.check,
    )  # fmt: skip
    watcher.on_saved = setup.keep_result
    try:
        average = fit(model, setup.strengths(objective), config.fit, job.folder, watcher, accelerator)
    except Stopped:
        if accelerator.is_main_process:
            setup.write_stopped()
        raise
    watcher.tell("saving", "writing the result")
    target = setup.result_path(config.fit.num_steps, final=True)
    if accelerator.is_main_process:
        setup.write(average.state_dict(), config.fit.num_steps, target)
    return target


@dataclass(kw_only=True)
class Setup:
    """What a job needs, made in the order in which memory allows it: text encoders and VAE first, then the DiT."""

    job: Job
    config: JobConfig
    files: ModelFiles
    watcher: JobWatcher
    accelerator: Accelerator

    def __post_init__(self) -> None:
        self.samples: list = []
        self.num_samples = 0
        self.base_hash = model_hash(self.files.dit, want="dit")

    @property
    def variant(self) -> Variant:
        return self.files.variant

    @property
    def dtype(self) -> torch.dtype:
        """Of the DiT's weights."""
        if self.config.dtype:
            return DTYPES[self.config.dtype]
        frozen = self.config.lora is not None and self.accelerator.device.type != "cpu"
        return torch.bfloat16 if frozen else torch.float32

    def material(self, report: ScanReport) -> tuple[Batches, Batches, Models]:
        """Batches to train on and to validate with, and the models without a DiT; encodes what is not cached yet."""
        config, device = self.config, self.accelerator.device
        encoders = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.watcher.tell("loading", "text encoders and VAE")
        models = Models(
            variant=self.variant, dit=None, text_encoder=load_text_of(self.files, encoders),
            vae=load_vae_of(self.files, encoders), device=device, dtype=encoders, model_hash=self.base_hash,
        )  # fmt: skip
        requests = [sample_request(sample, config.validation, models) for sample in config.validation.samples]
        self.watcher.tell("caching", "encoding the material")
        self.num_samples = len(report.items)
        folder = Path(config.data.cache) if config.data.cache else self.job.folder / CACHE
        # Of several processes one encodes while the others wait for its lock on the folder, and find all there.
        cache = build_cache(report, config.data, models, self.hashes(), folder, on_item=self.watcher.working)
        if self.accelerator.is_main_process:
            self.samples = [prepare(request, models) for request in requests]
        if config.data.cache_text:
            models = replace(models, text_encoder=None)
        batches = Batches(cache, config.data, self.variant, self.live_text(models))
        held_out = batches
        if config.validation.holdout:
            batches, held_out = batches.holdout(config.validation.holdout)
        log.info("%s", batches.describe())
        return batches, held_out, models

    def hashes(self) -> Hashes:
        """Of the weights that the cache depends on; the text encoders are too large to read whole for it."""
        text = (sampled_hash(self.files.text_encoder, want=None), sampled_hash(self.files.clip, want=None))
        return Hashes(vae=model_hash(self.files.vae), text=f"{'-'.join(text)}-{self.variant.max_text_tokens}")

    def live_text(self, models: Models) -> EncodeText | None:
        """Text encoders that stay on the device, where embeddings are not cached."""
        if self.config.data.cache_text:
            return None
        encoder = models.text_encoder
        encoder.to(self.accelerator.device)
        return lambda caption, cached: encode_caption(encoder, caption, cached.item, self.variant.max_text_tokens)

    def network(self, models: Models) -> tuple[nn.Module, Models]:
        """What moves, on its device, and the models with the DiT it moves in."""
        config = self.config
        self.watcher.tell("loading", "the DiT")
        dit = load_dit_of(self.files, self.dtype).to(self.accelerator.device)
        if config.base_weights:
            quantize_blocks(dit, config.base_weights)
        if config.gradient_checkpointing:
            checkpoint_blocks(dit)
        if config.lora is None:
            model: nn.Module = dit.requires_grad_(True)
        else:
            model = WithLora(dit, config.lora, torch.Generator().manual_seed(config.fit.seed))
            model.to(self.accelerator.device)
        count = sum(parameter.numel() for parameter in model.parameters())
        log.info("%s: %s million weights move", self.variant.name, f"{count / 1e6:,.2f}")
        return model, replace(models, dit=dit)

    def strengths(self, objective: Objective) -> Objective:
        """What is minimised, at the strengths of the LoRA that were asked for."""
        least = 1.0 if self.config.lora is None else self.config.lora.least_strength
        return objective if least == 1 else AtStrengths(objective, least)

    def nabla(self) -> object:
        """Attention of the training forward."""
        asked = {"auto": "auto", "on": "nabla", "off": "dense"}[self.config.nabla]
        return resolve_attention(asked, self.variant.nabla)

    def check(self, message: str) -> None:
        """Between sampling steps."""
        try:
            self.watcher.working(message)
        except Stopped as stopped:
            raise Interrupted from stopped

    def result_path(self, step: int, *, final: bool) -> Path:
        """Where the result of a step goes; `output_folder` is for the finished one, and no other job's file there is
        replaced."""
        config = self.config
        what = f"r{config.lora.rank}" if config.lora else "full"
        name = f"{config.name}-{self.variant.name}-{what}-{step}"
        folder = self.job.folder / RESULT
        if final and config.output_folder:
            folder = Path(config.output_folder)
        path = folder / f"{name}.safetensors"
        for number in range(2, 1000):
            if folder == self.job.folder / RESULT or not path.exists():
                break
            path = folder / f"{name}-{number}.safetensors"
        return path

    def keep_result(self, progress: Progress, path: Path) -> None:
        """A LoRA is small: beside each checkpoint that is kept lies its file."""
        if self.config.lora is None:
            return
        target = self.result_path(progress.step, final=False)
        self.write(average_of(path), progress.step, target)
        self.watcher.status = replace(self.watcher.status, result=str(target))
        kept = {int(file.stem.removeprefix("step-")) for file in list_checkpoints(self.job.folder)}
        for file in target.parent.glob("*.safetensors"):
            step = file.stem.rpartition("-")[2]
            if step.isdecimal() and int(step) not in kept:
                file.unlink()

    def write_stopped(self) -> None:
        """The result of a stopped run, from the checkpoint it ended with."""
        newest = list_checkpoints(self.job.folder)[-1]
        step = int(newest.stem.removeprefix("step-"))
        target = self.result_path(step, final=False)
        if not target.exists():
            self.write(average_of(newest), step, target)
        self.watcher.status = replace(self.watcher.status, result=str(target))

    def write(self, weights: dict[str, Tensor], step: int, target: Path) -> None:
        """Averaged weights as a file that loads by itself."""
        config = self.config
        told = to_dict(replace(config, output_folder="", data=replace(config.data, cache="", sources=_names(config))))
        metadata = {
            VARIANT_KEY: self.variant.name, BASE_KEY: self.base_hash, STEPS_KEY: str(step), JOB_KEY: json.dumps(told),
            "trigger": config.data.trigger, SAMPLES_KEY: str(self.num_samples),
        }  # fmt: skip
        target.parent.mkdir(parents=True, exist_ok=True)
        if config.lora is None:
            stored = {name: tensor.to(_stored(self.variant)) for name, tensor in weights.items()}
            write_tensors(target, stored, metadata)
            return
        # Loaders scale by alpha / rank, whatever made alpha.
        metadata["lora_alpha"] = f"{config.lora.scale * config.lora.rank:g}"
        tensors = {name: tensor.bfloat16() for name, tensor in lora_tensors(weights).items()}
        write_lora(target, tensors, config.layout, {key: value for key, value in metadata.items() if value})


def _stored(variant: Variant) -> torch.dtype:
    """As the files of the family are: Nano in fp16, the released ones in bf16."""
    return torch.float16 if variant.family.startswith("Nano") else torch.bfloat16


def _names(config: JobConfig) -> tuple:
    """Sources by their last name alone: files travel, and folders may name people."""
    return tuple(replace(source, path=Path(source.path).name) for source in config.data.sources)
