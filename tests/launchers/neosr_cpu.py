"""Run neosr's own training without CUDA, in a checkout or in a folder that holds the released package.

python neosr_cpu.py -opt X.toml [--auto_resume] [--launcher pytorch] [--dump FOLDER]

The released package (0.1.0) has no train.py. The loop below then calls the same parts in the same order.
"""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import cpu
import torch
from torch.overrides import TorchFunctionMode


def off_cuda(value: Any) -> Any:
    named = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
    return torch.device("cpu") if named else value


class OnCpu(TorchFunctionMode):
    """Every call of torch that names the device cuda gets cpu."""

    def __torch_function__(
        self, func: Any, types: Any, args: Tuple[Any, ...] = (), kwargs: Optional[Dict[str, Any]] = None
    ) -> Any:
        return func(*map(off_cuda, args), **{name: off_cuda(value) for name, value in (kwargs or {}).items()})


class Prefetcher:
    """The interface of neosr's CUDAPrefetcher, without streams."""

    def __init__(self, loader: Any, opt: Any) -> None:
        self.loader = loader
        self.reset()

    def reset(self) -> None:
        self.iterator = iter(self.loader)

    def next(self) -> Any:
        return next(self.iterator, None)


def without_cuda() -> None:
    cpu.no_cuda()
    load: Any = torch.load
    generator, autocast, scaler = torch.Generator, torch.autocast, torch.amp.GradScaler
    cpu.replace(
        (torch, "load", lambda file, map_location=None, **kwargs: load(file, map_location="cpu", **kwargs)),
        (torch, "Generator", lambda device="cpu": generator("cpu")),
        (torch, "autocast", lambda device_type="cpu", **kwargs: autocast("cpu", **kwargs)),
        (torch, "set_default_device", lambda device: None),
        (torch.amp, "GradScaler", lambda device="cpu", **kwargs: scaler("cpu", **kwargs)),
        (torch.cuda, "get_device_name", lambda *args: "CPU"),
        (torch.cuda, "get_device_capability", lambda *args: (8, 0)),
        (torch.cuda, "manual_seed", lambda seed: None),
        (torch.cuda, "manual_seed_all", lambda seed: None),
        (torch.cuda, "empty_cache", lambda: None),
    )


def train_released(root: str) -> None:
    """What neosr's train.py does, for the package that comes without it."""
    from neosr.data import build_dataloader, build_dataset
    from neosr.data.data_sampler import EnlargedSampler
    from neosr.models import build_model
    from neosr.utils import check_resume, get_root_logger, make_exp_dirs
    from neosr.utils.options import parse_options

    opt, args = parse_options(root, is_train=True)
    opt["root_path"] = root
    state = None
    states = list(Path("experiments", opt["name"], "training_states").glob("*.state"))
    if args.auto_resume and states:
        opt["path"]["resume_state"] = str(max(states, key=lambda path: int(path.stem)))
        state = torch.load(opt["path"]["resume_state"], weights_only=True)
        check_resume(opt, state["iter"])
    else:
        make_exp_dirs(opt)
    logger = get_root_logger("neosr", log_file=os.path.join(opt["path"]["log"], f"train_{os.getpid()}.log"))
    train = opt["datasets"]["train"]
    train.update(opt.get("degradations") or {})
    train_set = build_dataset(train)
    enlarged = train.get("dataset_enlarge_ratio", 1)
    sampler = EnlargedSampler(train_set, opt["world_size"], opt["rank"], enlarged)
    common = {"num_gpu": opt["num_gpu"], "dist": opt["dist"], "seed": opt["manual_seed"]}
    loader = build_dataloader(train_set, train, sampler=sampler, **common)
    val = opt["datasets"]["val"]
    validation = build_dataloader(build_dataset(val), val, sampler=None, **common)
    model = build_model(opt)
    iteration, epoch, total = 0, 0, int(opt["logger"]["total_iter"])
    if state is not None:
        model.resume_training(state)
        iteration, epoch = int(state["iter"]), state["epoch"]
    while iteration < total:
        sampler.set_epoch(epoch)
        for batch in itertools.islice(loader, total - iteration):
            iteration += 1
            model.feed_data(batch)
            model.optimize_parameters(iteration)
            model.update_learning_rate(iteration, warmup_iter=opt["train"].get("warmup_iter", -1))
            if iteration % opt["logger"]["print_freq"] == 0:
                losses = (f"{name}: {value:.4e}" for name, value in model.get_current_log().items())
                logger.info(f"iter: {iteration} {' '.join(losses)}")
            if iteration % opt["logger"]["save_checkpoint_freq"] == 0:
                model.save(epoch, iteration)
            if "val" in opt and iteration % opt["val"]["val_freq"] == 0:
                model.validation(validation, iteration, None, True)
        epoch += 1
    model.save(epoch=-1, current_iter=-1)


def main() -> None:
    cpu.prepare()
    sys.path.insert(0, os.getcwd())
    without_cuda()
    with OnCpu():
        cpu.contiguous_filter2d("neosr.models.otf")
        if "--launcher" in sys.argv:
            # Its own averaging of the losses stacks tensors of two shapes and uses what reduce returns, None.
            base: Any = importlib.import_module("neosr.models.base").base
            base.reduce_loss_dict = lambda self, losses: {k: v.mean().item() for k, v in losses.items()}
        if os.path.exists("train.py"):
            script: Any = importlib.import_module("train")
            script.CUDAPrefetcher = Prefetcher
            script.torch = cpu.torch_with_cuda()
            cpu.run(script, script.train_pipeline)
        else:
            cpu.run(importlib.import_module("neosr.models"), train_released)


if __name__ == "__main__":
    main()
