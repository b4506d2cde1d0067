"""One command for every method: ``python train.py model=reflectrm``; ``--help`` says more.

The story of a run: check the config -> own a run folder -> seed -> data, backbone, module,
callbacks, loggers, trainer -> fit and test -> arms to compare with -> metrics and closing table.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from omegaconf import DictConfig, OmegaConf, open_dict

from callbacks.preemption import Preempted, is_launched_child, watch
from callbacks.progress import RunProgressBar
from callbacks.throughput import peak_gib
from lightning_modules.backbones.families import family_of
from run_tools.checkpoints import backbone_of_checkpoint, load_checkpoint, naming_the_data
from run_tools.checks import check_config, trainer_values
from run_tools.folder import RunFolder, changed_keys
from run_tools.hparams import log_hyperparameters
from run_tools.merged import prepare_merge
from run_tools.messages import explain
from run_tools.resolvers import register
from run_tools.rounds import last_round
from run_tools.table import print_table
from run_tools.terminal import footer_lines, leave_group, leave_now, quiet

#: Keys of the group ``backbone`` that only say how its folder is made.
TINY_KEYS = ("family", "tiny", "warm_start", "merge")
CONF = Path(__file__).resolve().parent / "conf"
register()


def plain(config: Any) -> Any:
    """A config node as plain containers, interpolations resolved."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def task_settings(config: DictConfig) -> dict[str, Any]:
    """Plain values that identify a task, the state of its files included."""
    values = plain(config.data.task)
    files = {k: Path(v) for k, v in values.items() if isinstance(v, str) and Path(v).exists()}
    stats = {k: [path.stat().st_size, path.stat().st_mtime_ns] for k, path in files.items()}
    return {**values, "files": stats}


def run(config: DictConfig) -> dict[str, Any]:
    """Do what ``config`` says and return its flat metrics. Tests call this."""
    OmegaConf.resolve(seeded := config.copy())
    if config.mode == "report":
        from run_tools.report import report

        return report(config.report.claim, config.output_dir, config.report.folder, CONF)
    if config.mode == "merge":
        from run_tools.merge_command import merge_command

        return {"merged": str(merge_command({"merge": plain(config.merge)}))}
    is_fit = config.mode in ("fit", "fit_test")
    parts = [config.claim.name, config.claim.arm] if config.claim.name else [seeded.name]
    path = Path(seeded.output_dir, *parts, seeded.run_id)
    with open_dict(config):
        config.run_dir = str(path if is_fit else path / config.mode)
        config.predictions = config.predictions or f"{config.run_dir}/predictions.jsonl"
    check_config(plain(config))
    if config.mode == "plan":
        return run_plan(config)
    is_writer = getattr(rank_zero_only, "rank", 0) == 0
    folder = RunFolder.open(
        config.run_dir,
        resume=config.resume == "auto" or not is_fit,
        overwrite=config.overwrite,
        is_writer=is_writer,
    )
    if folder.metrics is not None and is_fit:
        rank_zero_warn(
            f"{folder.path} is finished: its metrics are returned (overwrite=true runs it again)"
        )
        return folder.metrics
    start = time.perf_counter()
    before = folder.path / "config.yaml"
    if is_writer and folder.checkpoint is not None and before.is_file():
        changed = changed_keys(read_config(before), plain(config))
        changed = [c for c in changed if not c.startswith(("resume ", "overwrite ", "compare "))]
        if changed:
            rank_zero_warn(f"resume=auto goes on with changed keys: {', '.join(changed)}")
    if is_writer:
        folder.write_text("config.yaml", OmegaConf.to_yaml(config, resolve=True))
    own = folder.read_json("own.json") if is_fit else None  # killed while an arm was trained
    try:
        config, earlier = last_round(config, run, compose, start_of) if is_fit else (config, {})
        metrics = own or run_one(config, folder) | earlier
    except Exception:
        if is_writer:
            folder.discard_if_empty()
        raise
    if own is None and is_fit and config.compare and is_writer:
        folder.write_json("own.json", metrics)
    for arm in config.compare if is_fit else []:
        metrics |= run_arm(config, arm)
    metrics |= {
        "seed": config.seed,
        "model": config.name,
        "time/wall_s": time.perf_counter() - start,
        "mem/peak_gib": peak_gib(),
    }
    if is_writer:
        folder.write_json("metrics.json" if is_fit else f"{config.mode}.json", metrics)
        (folder.path / "own.json").unlink(missing_ok=True)
        print_table(
            f"{'/'.join(parts)} ({config.mode}, seed {config.seed})",
            metrics,
            config.table,
            config.table_rows,
            footer_lines(typed(config), config.output_dir, folder.path) if config.table else [],
        )
    return metrics


def typed(config: DictConfig) -> list[str]:
    """Words of the command line; of a run that Python has started only its model."""
    is_known = HydraConfig.initialized()
    return list(HydraConfig.get().overrides.task) if is_known else [f"model={config.name}"]


def run_plan(config: DictConfig) -> dict[str, Any]:
    """Print what the run would take, and start nothing.

    Raises:
        ValueError: The method writes no rollouts.
    """
    from run_tools.plan import backbone_to_plan, plan, write
    from run_tools.plan_table import print_plan

    data = instantiate(config.data, _convert_="all")
    if not hasattr(data, "prompts_per_rollout"):
        raise ValueError(
            f"mode=plan knows methods that write rollouts, and model={config.name} writes none; "
            f"mode=fit trainer.max_steps=3 measures it (mem/ and time/ in metrics.json)"
        )
    with backbone_to_plan(plain(config.backbone), data.task, config.seed) as backbone:
        found = plan(build_module(config, backbone), data, plain(config))
    print_plan(config.name, found, plain(config))
    if config.plan.output:
        write(found, config.plan.output)
    return found.flat()


def read_config(path: Path) -> dict[str, Any]:
    """The config of an earlier start as plain values; nothing in it is instantiated.

    Raises:
        ValueError: It is no plain YAML mapping.
    """
    try:
        return dict(plain(OmegaConf.load(path)))
    except Exception as error:
        first = " ".join(str(error).split())
        raise ValueError(f"{path}: not a config of ours ({first}); remove the file") from error


def load(run_dir: str | Path) -> Any:
    """The trained module of a finished run, ready for ``module.judge(pairs)`` and the like.

    Its ``config.yaml`` names the classes to build: load only folders that you trust.

    Args:
        run_dir: Folder with ``config.yaml`` and ``export/``.

    Example:
        >>> judge = load("outputs/reflectrm/s0")  # doctest: +SKIP
        >>> judge.judge([Pair("1", "2 0 1 1", ("2 2 0 1", "2 2 1 1"))])  # doctest: +SKIP
    """
    config: Any = OmegaConf.load(Path(run_dir, "config.yaml"))
    data = instantiate(config.data, _convert_="all")
    path = str(Path(run_dir, "export"))
    data.prepare(path, config.cache_dir, for_training=False)
    backbone = plain(config.backbone) | {"path": path}
    config.lora.enabled = False  # the export has its adapters merged
    module = build_module(config, backbone)
    module.configure_model()
    module.eval()
    module.after_load(data)
    return module


def compose(overrides: Sequence[str]) -> DictConfig:
    """The config of the command line ``overrides``, for a run that another run needs."""
    if GlobalHydra.instance().is_initialized():
        return hydra.compose("train", overrides=list(overrides))
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("train", overrides=list(overrides))


def start_of(config: DictConfig) -> str:
    """Folder of the backbone that a config starts from."""
    return str(prepare_backbone(config, instantiate(config.data, _convert_="all"))["path"])


def run_arm(config: DictConfig, arm: str) -> dict[str, Any]:
    """Train a further arm of this run in its sub-folder; its rows are ``test/<arm>/...``."""
    changed: Any = OmegaConf.merge(config, OmegaConf.from_dotlist(list(config.arms[arm])))
    with open_dict(changed):
        changed.compare, changed.test_base, changed.table = [], False, []
        changed.output_dir, changed.name = config.run_dir, "arms"
        changed.claim = {"name": None, "arm": None}
        changed.run_id, changed.resume, changed.overwrite = arm, "auto", False
        changed.callbacks.progress.label = arm
        changed.predictions = None
    values = run(changed)
    return {f"test/{arm}/{tag[5:]}": v for tag, v in values.items() if tag.startswith("test/")}


def run_one(config: DictConfig, folder: RunFolder) -> dict[str, Any]:
    """Build everything, then fit, test, validate or predict."""
    draft = plain(config.backbone)
    build_module(config, draft | {"path": draft["path"] or ""})  # refused before a warm start
    pl.seed_everything(config.seed, workers=True, verbose=False)
    if config.trainer.num_threads:
        torch.set_num_threads(config.trainer.num_threads)
    checkpoint = str(folder.checkpoint or config.ckpt_path or "") or None
    if checkpoint:
        load_checkpoint(checkpoint)  # refused, if it is, before anything is prepared
    data = instantiate(config.data, _convert_="all")
    backbone = prepare_backbone(config, data)
    data.trust_remote_code = backbone["trust_remote_code"]
    with naming_the_data(checkpoint or backbone["path"]):
        data.prepare(
            backbone["path"],
            config.cache_dir,
            task_settings(config),
            for_training=config.mode.startswith("fit"),
        )
    module = build_module(config, backbone)
    module.task_name, module.task_settings = data.task.name, plain(config.data.task)
    trainer = build_trainer(config, data, folder)
    metrics: dict[str, Any] = {}
    options = {"datamodule": data, "weights_only": True}
    if config.mode in ("fit", "fit_test"):
        if config.mode == "fit_test" and config.test_base:
            base = folder.read_json("base.json")
            if base is None:
                trainer.test(module, verbose=False, **options)
                base = {k: v for k, v in module.results.items() if k.startswith("test/")}
                if trainer.is_global_zero:
                    folder.write_json("base.json", base)
            metrics |= {f"test/base/{tag[5:]}": value for tag, value in base.items()}
        began = time.perf_counter()
        trainer.fit(module, ckpt_path=checkpoint, **options)
        metrics |= {
            "time/train_s": time.perf_counter() - began,
            "steps": trainer.global_step,
            "bad_steps": module.bad_steps,
        }
        if config.mode == "fit_test":
            trainer.test(module, verbose=False, **options)
        metrics |= module.results
    elif config.mode == "predict":
        trainer.predict(module, ckpt_path=checkpoint, **options)
        print(f"predictions: {config.predictions}")
    else:
        evaluate = trainer.test if config.mode == "test" else trainer.validate
        evaluate(module, ckpt_path=checkpoint, verbose=False, **options)
        metrics |= module.results
    log_hyperparameters(plain(config), trainer, metrics, logged=module.results)
    return metrics


def prepare_backbone(config: DictConfig, data: Any) -> dict[str, Any]:
    """Plain options of the backbone to start from: a path, a checkpoint's own, or a tiny one."""
    options = plain(config.backbone)
    family = family_of(options)
    _, tiny, warm_start, merge = (options.pop(key, None) for key in TINY_KEYS)
    if merge:
        options["path"] = str(prepare_merge(merge, config.cache_dir))
    is_whole = not config.lora.enabled  # a checkpoint of adapters has no other weights
    if not options["path"] and config.ckpt_path and is_whole and not config.mode.startswith("fit"):
        options |= {
            "path": str(backbone_of_checkpoint(config.ckpt_path, config.cache_dir)),
            "random_init": True,
        }
    if not options["path"]:
        if data.task.vocabulary() is None:
            rank_zero_warn(
                "a tiny model that has never read real text cannot judge English: "
                "this run shows that the pipeline works, nothing else; for results use "
                "backbone=hf backbone.path=<model>"
            )
        options["path"] = str(
            family.prepare(
                data.task,
                tiny=tiny,
                warm_start=warm_start,
                task_settings=task_settings(config),
                seed=config.seed,
                cache_dir=config.cache_dir,
                callbacks=[RunProgressBar(label="warm start")],
            )
        )
    return options


def build_module(config: DictConfig, backbone: dict[str, Any]) -> Any:
    """The LightningModule from plain values; keys of ``TINY_KEYS`` are not for it."""
    lora = plain(config.lora)
    enabled = lora.pop("enabled")
    return instantiate(
        config.model,
        backbone={k: v for k, v in backbone.items() if k not in TINY_KEYS},
        optimizer=plain(config.optimizer),
        lora=lora if enabled else None,
        kernel=plain(config.kernel),
        _recursive_=False,
        _convert_="all",
    )


def build_trainer(config: DictConfig, data: Any, folder: RunFolder) -> pl.Trainer:
    """Lightning's Trainer with the named callbacks and loggers."""
    callbacks = [instantiate(c) for c in config.callbacks.values() if c is not None]
    loggers = []
    for logger in config.logger.values():
        extra: dict[str, Any] = {}
        if config.resume == "auto" and "TensorBoard" in logger._target_:
            made = load_checkpoint(folder.checkpoint) if folder.checkpoint else {"global_step": -1}
            # what a killed run logged after its checkpoint
            extra = {"purge_step": made["global_step"] + 1}
            # readers order event files by the second they were made in
            time.sleep(1.0 if folder.checkpoint else 0.0)
        loggers.append(instantiate(logger, **extra))
    values = trainer_values(plain(config.trainer), getattr(data, "window", 1))
    trainer = instantiate(
        values,
        callbacks=callbacks,
        logger=loggers,
        default_root_dir=config.run_dir,
        _convert_="all",
    )
    return trainer


_FAULTS: list[Exception] = []  # of a single run, so that Hydra prints nothing around them


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def _hydra_main(config: DictConfig) -> None:
    quiet()
    try:
        preemption = plain(config.callbacks.get("preemption") or {"signals": []})
        with watch(**preemption):
            run(config)
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        _FAULTS.append(error)


def main() -> None:
    """Command line: one clear line for what the user did wrong, a traceback for our own faults."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    _FAULTS.clear()
    try:
        _hydra_main()
        if _FAULTS:
            raise _FAULTS[0]
    except Preempted as end:
        if getattr(rank_zero_only, "rank", 0) == 0:
            print(end.message, file=sys.stderr)
        leave_group(int(end.code or 0), wait=1.0 if is_launched_child() else 0.0)
        raise
    except Exception as error:
        message = explain(error, CONF)
        if message is None or any(word.startswith("debug=") for word in sys.argv):
            raise
        print(f"error: {message}", file=sys.stderr)
        if torch.distributed.is_initialized():
            leave_now(1)
        sys.exit(1)
    leave_group()


if __name__ == "__main__":
    main()
