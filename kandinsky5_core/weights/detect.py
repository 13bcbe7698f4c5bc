"""What a weights file is: kind, layout, sizes and variant, from names, shapes and metadata; no tensor is read."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from ..config import VARIANTS, DiTConfig, VAEConfig
from . import deduce, kinds
from .container import DTYPES, TensorRecord, WeightsError
from .keys import PREFIXES, attention_as_matrix, count_indexed, split_prefixes, vae_from_single
from .modules import tensor_shapes
from .scaled_fp8 import split_scales
from .source import WeightsSource, open_source
from .variants import Choice, choose_variant, matching_variants

_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class WeightsInfo:
    """What one model in a file or folder is."""

    kind: str
    """'dit', 'hunyuan_vae', 'flux_vae', 'qwen', 'clip', 'lora' or 'unknown'."""
    looks_like: str
    """The kind in words; for unknown ones the foreign model it seems to be."""
    layout: str
    """DiT: 'official', 'diffusers', 'comfyui'. VAE: 'diffusers', 'comfyui' (video), 'bfl' (images). Else 'other'."""
    prefix: str
    """What stands before every name, such as 'model.diffusion_model.'; often ''."""
    dtypes: tuple[str, ...]
    """'bf16', 'fp32', ...: the one with most parameters first."""
    num_tensors: int
    num_parameters: int
    config: DiTConfig | VAEConfig | None = None
    variants: tuple[str, ...] = ()
    """Rows of `VARIANTS` with exactly these sizes (for a VAE: that use it)."""
    variant: str | None = None
    """The best guess among `variants`; None for anything but a DiT of released sizes."""
    variant_reason: str = ""
    variant_certain: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None
    files: tuple[Path, ...] = ()
    sharded: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for printing."""
        values = {name.name: getattr(self, name.name) for name in dataclasses.fields(self)}
        values["config"] = dataclasses.asdict(self.config) if self.config else None
        values["path"] = str(self.path) if self.path else None
        values["files"] = [str(file) for file in self.files]
        values["metadata"] = dict(self.metadata)
        return values


@dataclass(frozen=True, kw_only=True)
class Identified:
    """A source whose model is known, and where each tensor of our module lies in it."""

    info: WeightsInfo
    records: Mapping[str, TensorRecord]
    """Our tensor name -> where it is, with attention projections of VAEs as matrices."""
    scales: Mapping[str, TensorRecord] | None = None
    """Of fp8 weights, by the weights' names; None where the model is not loaded from fp8."""


def inspect_file(path: str | Path, *, want: str | None = None) -> WeightsInfo:
    """What the weights at `path` (file, index, folder) are. Reads headers only.

    Args:
        want: 'dit' or 'vae' where a folder or a full checkpoint holds both; default the DiT if there is one.

    Raises:
        WeightsError: not safetensors, truncated, incomplete or mixed.
    """
    return identify(open_source(path, want=want), want=want).info


def inspect_tensors(
    tensors: Mapping[str, tuple[tuple[int, ...], str]],
    *,
    metadata: Mapping[str, str] | None = None,
    folder_config: Mapping[str, Any] | None = None,
    name: str = "",
    want: str | None = None,
) -> WeightsInfo:
    """The same from name -> (shape, safetensors dtype code), where there is no file.

    Args:
        metadata: safetensors metadata.
        folder_config: config.json.
        name: a file name, which may break a tie among variants.
    """
    records = {key: TensorRecord(tuple(shape), dtype) for key, (shape, dtype) in tensors.items()}
    source = WeightsSource(
        path=Path(name), files=(), tensors=records, metadata=metadata or {}, folder_config=folder_config
    )
    return identify(source, want=want).info


def identify(source: WeightsSource, *, want: str | None = None) -> Identified:
    """Kind, sizes and variant of a source, checked against the tensors a model of these sizes has.

    Raises:
        WeightsError: names or shapes are not those of the model it looks like, or two models are mixed.
    """
    prefix, kind = _choose_part(source, want)
    records = {
        name[len(prefix) :]: record
        for name, record in source.tensors.items()
        if name.startswith(prefix) and (prefix or not name.startswith(PREFIXES))
    }
    looks_like = kinds.looks_like(records.keys())
    try:
        scales = None
        if kind == kinds.DIT:
            records, scales = split_scales(records)
        if kind in (kinds.DIT, *kinds.VAE_KINDS):
            _check_unmixed(source, prefix, records)
        if kind == kinds.DIT:
            return _identify_dit(source, prefix, records, scales)
        if kind in kinds.VAE_KINDS:
            return _identify_vae(source, kind, prefix, records)
    except WeightsError as error:
        raise WeightsError(f"{source.path}: looks like {looks_like}, but {error}{_shard_hint(source)}") from error
    return Identified(info=_info(source, kind, looks_like, "other", prefix, records), records=records)


def _choose_part(source: WeightsSource, want: str | None) -> tuple[str, str]:
    found = {prefix: kinds.kind_of(set(names)) for prefix, names in split_prefixes(source.tensors).items()}
    wanted = {"dit": (kinds.DIT,), "vae": kinds.VAE_KINDS, None: (kinds.DIT, *kinds.VAE_KINDS)}[want]
    for kind in (*wanted, kinds.DIT, *kinds.VAE_KINDS, kinds.LORA, kinds.QWEN, kinds.CLIP):
        for prefix, found_kind in found.items():
            if found_kind == kind:
                return prefix, kind
    return next(iter(found), ""), kinds.UNKNOWN


def _check_unmixed(source: WeightsSource, prefix: str, records: Mapping[str, TensorRecord]) -> None:
    """Full checkpoints hold several models, each under its own prefix; anything beside that is a mixture."""
    if kinds.is_quantised(records.keys()):
        raise WeightsError("quantised in a way that is not read; expected fp32, fp16 or bf16 weights, a DiT's also fp8")
    parts = split_prefixes(source.tensors)
    others = {other: names for other, names in parts.items() if other != prefix}
    for other, names in others.items():
        if "" in (prefix, other) or kinds.kind_of(set(names)) == kinds.kind_of(records.keys()):
            raise WeightsError(
                f"it also holds {len(names)} tensors of {kinds.looks_like(set(names))} "
                f"({_some([other + name for name in names])}); expected one model, or each under its own prefix"
            )


def _identify_dit(
    source: WeightsSource, prefix: str, records: Mapping[str, TensorRecord], scales: Mapping[str, TensorRecord]
) -> Identified:
    hints = deduce.hints_from(source.metadata, source.folder_config)
    config = deduce.dit_config(_shapes(records), hints)
    check_tensors(_shapes(records), tensor_shapes(config))
    deduce.report_disagreement(config, hints)
    rows = matching_variants(config)
    path = source.files[0].absolute() if source.files else PurePath(source.path)
    choice = choose_variant(rows, source.metadata, source.folder_config, path)
    in_folder = source.sharded or "_class_name" in (source.folder_config or {})
    layout = "comfyui" if prefix else "diffusers" if in_folder else "official"
    info = _info(source, kinds.DIT, kinds.WORDS[kinds.DIT], layout, prefix, records)
    info = _with_variant(info, config, tuple(row.name for row in rows), choice)
    return Identified(info=info, records=records, scales=scales)


def _identify_vae(source: WeightsSource, kind: str, prefix: str, records: Mapping[str, TensorRecord]) -> Identified:
    levels = count_indexed(records, "encoder.down")
    if levels:
        records = {vae_from_single(name, levels): record for name, record in records.items()}
    records = {name: record._replace(shape=attention_as_matrix(name, record.shape)) for name, record in records.items()}
    hints = deduce.hints_from(source.metadata, source.folder_config)
    config = deduce.vae_config(kind, _shapes(records), hints)
    check_tensors(_shapes(records), tensor_shapes(config))
    deduce.report_disagreement(config, hints)
    single = "comfyui" if kind == kinds.HUNYUAN_VAE else "bfl"
    info = _info(source, kind, kinds.WORDS[kind], single if levels else "diffusers", prefix, records)
    users = tuple(row.name for row in VARIANTS.values() if row.vae == config)
    return Identified(info=_with_variant(info, config, users, Choice(None, "", False)), records=records)


def check_tensors(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse names or shapes other than those expected.

    Raises:
        WeightsError: lists the first few that are missing, unexpected or of another shape.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    wrong = [
        f"{name} is {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [f"{len(missing)} tensors are missing ({_some(missing)})"] if missing else []
    if extra:
        words = kinds.looks_like(set(extra))
        told = words.startswith((kinds.WORDS[kinds.UNKNOWN], kinds.WORDS[kinds.DIT]))
        foreign = "" if told else f", like {words}"
        problems.append(f"{len(extra)} tensors do not belong ({_some(extra)}){foreign}")
    if wrong:
        problems.append(f"{len(wrong)} tensors have other shapes ({'; '.join(wrong[:_SHOWN])})")
    if problems:
        raise WeightsError(f"{' and '.join(problems)}; expected the {len(expected)} tensors of one whole model")


def _info(
    source: WeightsSource, kind: str, looks_like: str, layout: str, prefix: str, records: Mapping[str, TensorRecord]
) -> WeightsInfo:
    sizes = Counter[str]()
    for record in records.values():
        sizes[DTYPES[record.dtype][0]] += record.numel
    return WeightsInfo(
        kind=kind, looks_like=looks_like, layout=layout, prefix=prefix,
        dtypes=tuple(dtype for dtype, _ in sizes.most_common()),
        num_tensors=len(records), num_parameters=sum(sizes.values()),
        metadata=dict(source.metadata), path=source.path, files=source.files, sharded=source.sharded,
    )  # fmt: skip


def _with_variant(
    info: WeightsInfo, config: DiTConfig | VAEConfig, variants: tuple[str, ...], choice: Choice
) -> WeightsInfo:
    return dataclasses.replace(
        info, config=config, variants=variants,
        variant=choice.name, variant_reason=choice.reason, variant_certain=choice.certain,
    )  # fmt: skip


def _shapes(records: Mapping[str, TensorRecord]) -> dict[str, tuple[int, ...]]:
    return {name: record.shape for name, record in records.items()}


def _shard_hint(source: WeightsSource) -> str:
    single = not source.sharded and source.files and "-of-" in source.files[0].name
    return "; this is one shard: name its folder or index file" if single else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
