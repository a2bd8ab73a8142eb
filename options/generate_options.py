"""Write every option template of AetherNet, for traiNNer-redux, neosr and BasicSR, from the values below.

    python options/generate_options.py           # write
    python options/generate_options.py --check   # exit 1 and name the files that are out of date

Edit this file, never a template. What is shared between the frameworks (rates, batches, schedule) stands once, at the top.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

HERE = Path(__file__).resolve().parent
FOLDERS = ("traiNNer-redux", "neosr", "basicsr")  # inside them, files named as templates are owned by this script
SCALES = (2, 3, 4)


class Size(NamedTuple):
    batch: int  # images a step on one card
    rate: str  # learning rate


# Batch: the norms use the batch's own statistics, so it is kept at 16 (8 where memory asks for it). Rate: at 5e-4, with convolutions
# that start at a standard deviation of 0.02, activations stay small enough for INT8; the deeper network gets less.
SIZES: Dict[str, Size] = {"small": Size(16, "5e-4"), "medium": Size(16, "5e-4"), "large": Size(8, "3e-4")}
LQ_SIZE = 64  # low-resolution pixels; the 11x11 kernels of the smallest network see further than 48


class Kind(NamedTuple):
    title: str
    otf: bool
    gan: bool
    qat: bool
    iterations: int
    milestones: List[int]
    warmup: int
    final: float  # the last learning rate, as a fraction of the first


FIDELITY = (500_000, [250_000, 400_000, 450_000, 475_000], 2_000, 0.06)
FINETUNE = (200_000, [100_000, 150_000], 1_000, 0.25)
KINDS: Dict[str, Kind] = {
    "fidelity": Kind("fidelity, from scratch", False, False, False, *FIDELITY),
    "gan": Kind("perceptual and GAN losses, from a fidelity model", False, True, False, *FINETUNE),
    "otf_fidelity": Kind("fidelity, degraded on the fly, from scratch", True, False, False, *FIDELITY),
    "otf_gan": Kind("perceptual and GAN losses, degraded on the fly, from its fidelity model", True, True, False, *FINETUNE),
    "qat": Kind("quantisation-aware fine-tuning of a fidelity model", False, False, True, 40_000, [20_000, 30_000], 1_000, 0.01),
}

FINETUNE_RATE = "1e-4"  # from trained weights: a fifth of the first rate keeps what they know
QAT_RATE = "2e-5"  # the weights are right already and only settle on the 8-bit steps
WHY_QAT_EMA = "a short average: the ranges follow the first 100 batches, and the average of both starts over"
WHY_QAT_AMP = "rounding to 8 bits is exact in fp32 only; 40 000 iterations are short"


def rate_of(kind: Kind, size: Size) -> str:
    return QAT_RATE if kind.qat else FINETUNE_RATE if kind.gan else size.rate


def parent_of(name: str) -> str:
    """The template whose result a fine-tuning starts from."""
    return "otf_fidelity" if name == "otf_gan" else "fidelity"


WHY_RATE = "norms, biases and gates are not to shrink: no weight decay"
WHY_WARMUP = "Adam's first steps move every weight by the whole learning rate, whatever the gradient: small ones keep what the network is"
# neosr's warmup_iter (and traiNNer-redux's) lowers the rate after the first step only: that one is taken at the full rate, which throws a
# new network far off. A cosine that starts low, and falls again in its second half, has no such step.
WHY_ONE_CYCLE = "the rate starts here, peaks at eta_min of the scheduler half-way, and ends here; warmup_iter would take a first step at the peak"
WHY_EMA = "averages about the last 1000 steps; the norms' statistics are averaged or copied with the weights"
WHY_RENORM = "for a batch of 4 to 8: validation then sees what training saw, see docs/small_batch.md"
SMALLER = ", and at 8 or 4 set batch_renorm"
BOUND = "1.0"
WHY_BOUND = "no block's norm gives more (its spread is 0.25 at first), so no outlier grows from block to block; it is in the weights from then on"


def network_options(kind: Kind, size: Size, indent: str, equals: str) -> str:
    """The options that the kind or the batch asks for; commented out where the template's batch is large enough without.

    The bound is in the weights that a fine-tuning starts from, whatever its template says.
    """
    if kind.qat:
        return f"{indent}qat{equals}true  # true: the blocks; 'full': the whole body in 8 bits, faster and less exact, docs/int8.md"
    line, comment = f"{indent}batch_renorm{equals}true", f"{indent}{'# ' if indent else '#'}batch_renorm{equals}true"
    return f"{indent}bound{equals}{BOUND}  # {WHY_BOUND}\n{line if size.batch <= 8 else comment}  # {WHY_RENORM}"


# --------------------------------------------------------------------------------------------------------------- traiNNer-redux

REDUX_SCHEMA = (
    "# yaml-language-server: $schema=https://raw.githubusercontent.com/the-database/traiNNer-redux/refs/heads/master/schemas/redux-config.schema.json"
)


def redux_train(size_name: str, scale: int, kind_name: str) -> str:
    size, kind = SIZES[size_name], KINDS[kind_name]
    name = f"{scale}x_AetherNet_{size_name}_{kind_name}"
    parent = f"experiments/{scale}x_AetherNet_{size_name}_{parent_of(kind_name)}/models/net_g_ema_latest.safetensors"
    otf = """
# Degradation on the fly; every range that is not named here has traiNNer-redux's default.
high_order_degradation: true
high_order_degradations_debug: false  # true: look at the pairs in debug/otf before a long training
blur_prob: 0.0
resize_prob: [0.2, 0.7, 0.1]  # up, down, keep
resize_range: [0.4, 1.5]
gaussian_noise_prob: 0.0
jpeg_prob: 1.0
jpeg_range: [75, 95]
blur_prob2: 0.0
resize_prob2: [0.3, 0.4, 0.3]
resize_range2: [0.6, 1.2]
gaussian_noise_prob2: 0.0
jpeg_prob2: 1.0
jpeg_range2: [75, 95]
queue_size: 192  # a multiple of the batch size
"""
    amp = "use_amp: true\namp_bf16: false  # fp16 with loss scaling. bf16 rounds validation images by up to 3 steps of 255; the norms compute in fp32"
    if kind.qat:
        amp = f"use_amp: false  # {WHY_QAT_AMP}"
    dataset = "realesrgandataset" if kind.otf else "pairedimagedataset"
    lq = "" if kind.otf else "\n    dataroot_lq: [datasets/train/dataset1/lr]  # the same file names; no LR images? see docs/traiNNer-redux.md"
    discriminator = "\nnetwork_d:\n  type: dunet\n" if kind.gan else ""
    pretrain = "# pretrain_network_g: another AetherNet of this size, .pth or .safetensors"
    if kind.gan or kind.qat:
        pretrain = f"pretrain_network_g: {parent}"
    ema = f"ema_decay: 0.999  # {WHY_EMA}"
    if kind.qat:
        ema = f"ema_decay: 0.99  # {WHY_QAT_EMA}"
    elif not kind.gan:
        ema += "\n  ema_power: 0.75  # a shorter average at the start of a training from scratch"
    optim_d = """
  optim_d:
    type: AdamW
    lr: !!float 1e-4
    weight_decay: 0
    betas: [0.9, 0.99]""" if kind.gan else ""  # fmt: skip
    losses = """
    - type: mssimloss
      loss_weight: 0.5
    - type: hsluvloss  # keeps colours
      criterion: charbonnier
      loss_weight: 1.0
    - type: perceptualloss
      criterion: charbonnier
      loss_weight: 0.01
    - type: ganloss
      gan_type: vanilla
      loss_weight: 0.1""" if kind.gan else """
    - type: charbonnierloss  # follows PSNR, and is calmer than L2 on outliers
      loss_weight: 1.0"""  # fmt: skip
    return f"""{REDUX_SCHEMA}
# AetherNet {size_name} x{scale}: {kind.title}. Generated by generate_options.py; copy it, then edit the copy.

####################
# General Settings
####################
name: {name}
scale: {scale}
{amp}
use_channels_last: true
use_compile: false  # works without graph breaks; worth its start-up time in a long training
num_gpu: auto
{otf if kind.otf else ""}
###################################
# Dataset and Dataloader Settings
###################################
datasets:
  train:
    name: Train Dataset
    type: {dataset}
    dataroot_gt: [datasets/train/dataset1/hr]  # one folder or several{lq}
    lq_size: {LQ_SIZE}  # the receptive field is larger than 48
    use_hflip: true
    use_rot: true
    num_worker_per_gpu: 8
    batch_size_per_gpu: {size.batch}  # out of memory: halve it before lq_size{'' if kind.qat else SMALLER}
    accum_iter: 1
  val:
    name: Val Dataset
    type: pairedimagedataset
    dataroot_gt: [datasets/val/dataset1/hr]
    dataroot_lq: [datasets/val/dataset1/lr]

####################
# Network Settings
####################
network_g:
  type: aether_{size_name}
{network_options(kind, size, "  ", ": ")}
{discriminator}
##############################
# Pretrain and Resume Paths
##############################
path:
  {pretrain}
  strict_load_g: true
  resume_state: ~

#####################
# Training Settings
#####################
train:
  {ema}
  grad_clip: false
  optim_g:
    type: AdamW
    lr: !!float {rate_of(kind, size)}
    weight_decay: 0  # {WHY_RATE}
    betas: [0.9, 0.99]{optim_d}

  scheduler:
    type: CosineAnnealingWarmupLR
    total_iters: {kind.iterations}  # the same as total_iter
    warmup_iters: {kind.warmup}  # {WHY_WARMUP}
    eta_min_ratio: {kind.final}

  total_iter: {kind.iterations}
  warmup_iter: -1  # the scheduler does it: this one would take the very first step at the full rate

  losses:{losses}

##############
# Validation
##############
val:
  val_enabled: false  # true once the folders above are yours
  val_freq: 5000
  save_img: true
  tile_size: 0
  tile_overlap: 8
  metrics_enabled: true
  metrics:
    psnr:
      type: calculate_psnr
      crop_border: {scale}
      test_y_channel: false
    ssim:
      type: calculate_ssim
      crop_border: {scale}
      test_y_channel: false

###########
# Logging
###########
logger:
  print_freq: 100
  save_checkpoint_freq: 5000
  save_checkpoint_format: safetensors
  use_tb_logger: true
"""


def redux_test(size_name: str, scale: int) -> str:
    return f"""{REDUX_SCHEMA}
# AetherNet {size_name} x{scale}: run a trained or fused model on a folder. Generated by generate_options.py.

name: {scale}x_AetherNet_{size_name}
scale: {scale}
use_amp: false
num_gpu: auto

datasets:
  val:
    name: Val Dataset
    type: singleimagedataset
    dataroot_lq: [datasets/val/dataset1/lr]
    io_backend:
      type: disk

network_g:
  type: aether_{size_name}

path:
  # Training form or fused form: the network takes the form of the file.
  pretrain_network_g: experiments/{scale}x_AetherNet_{size_name}_fidelity/models/net_g_ema_latest.safetensors

val:
  val_enabled: true
  save_img: true
  tile_size: 0
  tile_overlap: 16
  metrics_enabled: false
"""


def redux_onnx(size_name: str, scale: int) -> str:
    return f"""{REDUX_SCHEMA}
# AetherNet {size_name} x{scale}: traiNNer-redux's own ONNX export. Generated by generate_options.py.

name: {scale}x_AetherNet_{size_name}
scale: {scale}
num_gpu: auto

network_g:
  type: aether_{size_name}

path:
  # The file that fuse_aether.py wrote: the exporter does not fuse, and from a training file it writes the slow form.
  pretrain_network_g: {scale}x_AetherNet_{size_name}_fused.safetensors

onnx:
  dynamo: false
  dtype: fp32  # fp16 for TensorRT
  opset: 20
  shape: 1x3xHxW
  verify: true
  optimize: false
"""


# ------------------------------------------------------------------------------------------------------------------------ neosr

NEOSR_DEGRADATIONS = """
[degradations]
resize_prob = [ 0.3, 0.4, 0.3 ]  # up, down, keep
resize_range = [ 0.5, 1.5 ]
gaussian_noise_prob = 0.2
noise_range = [ 0, 2 ]
poisson_scale_range = [ 0.05, 0.25 ]
gray_noise_prob = 0.1
jpeg_range = [ 40, 95 ]
second_blur_prob = 0.4
resize_prob2 = [ 0.3, 0.4, 0.3 ]
resize_range2 = [ 0.3, 1.5 ]
gaussian_noise_prob2 = 0.2
noise_range2 = [ 0, 2 ]
poisson_scale_range2 = [ 0.05, 0.1 ]
gray_noise_prob2 = 0.1
jpeg_range2 = [ 35, 95 ]
blur_kernel_size = 7
kernel_list = [ "iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso" ]
kernel_prob = [ 0.45, 0.25, 0.12, 0.03, 0.12, 0.03 ]
sinc_prob = 0.1
blur_sigma = [ 0.2, 3 ]
betag_range = [ 0.5, 4 ]
betap_range = [ 1, 2 ]
blur_kernel_size2 = 9
kernel_list2 = [ "iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso" ]
kernel_prob2 = [ 0.45, 0.25, 0.12, 0.03, 0.12, 0.03 ]
sinc_prob2 = 0.1
blur_sigma2 = [ 0.2, 1.5 ]
betag_range2 = [ 0.5, 4 ]
betap_range2 = [ 1, 2 ]
final_sinc_prob = 0.8
"""


def neosr_train(size_name: str, scale: int, kind_name: str) -> str:
    size, kind = SIZES[size_name], KINDS[kind_name]
    parent = f"experiments/train_aether_{size_name}_x{scale}_{parent_of(kind_name)}/models/net_g_latest.pth"
    lq = "" if kind.otf else "\ndataroot_lq = 'datasets/train/lq/'  # the same file names"
    amp = "use_amp = true\nbfloat16 = true  # RTX 3000 and newer; false: fp16. The norms compute in fp32 either way"
    if kind.qat:
        amp = f"use_amp = false  # {WHY_QAT_AMP}"
    discriminator = '\n[network_d]\ntype = "unet"\n' if kind.gan else ""
    pretrain = f"pretrain_network_g = '{parent}'" if kind.gan or kind.qat else "#pretrain_network_g = 'another AetherNet of this size.pth'"
    optim_d = """
[train.optim_d]
type = "adamw"
lr = 1e-6
betas = [ 0.9, 0.99 ]
weight_decay = 0
""" if kind.gan else ""  # fmt: skip
    losses = """
[train.mssim_opt]
type = "mssim_loss"
loss_weight = 0.5

[train.perceptual_opt]
type = "vgg_perceptual_loss"
loss_weight = 0.5

[train.gan_opt]
type = "gan_loss"
gan_type = "bce"
loss_weight = 0.1
""" if kind.gan else """
[train.pixel_opt]
type = "L1Loss"
loss_weight = 1.0
"""  # fmt: skip
    ema = f"ema = 0.999  # {WHY_EMA}"
    if kind.qat:
        ema = f"ema = 0.99  # {WHY_QAT_EMA}"
    return f"""# AetherNet {size_name} x{scale}: {kind.title}. Generated by generate_options.py; copy it, then edit the copy.

name = "train_aether_{size_name}_x{scale}_{kind_name}"
model_type = "{"otf" if kind.otf else "image"}"
scale = {scale}
{amp}
fast_matmul = true
#compile = true  # works without graph breaks
#manual_seed = 1024

[datasets.train]
type = "{"otf" if kind.otf else "paired"}"
dataroot_gt = 'datasets/train/gt/'{lq}
patch_size = {LQ_SIZE}  # low-resolution pixels; the receptive field is larger than 48
batch_size = {size.batch}  # out of memory: halve it before patch_size{'' if kind.qat else SMALLER}
#accumulate = 1
#dataset_enlarge_ratio = 100  # with few images
{NEOSR_DEGRADATIONS if kind.otf else ""}
[datasets.val]
name = "val"  # neosr looks for this name
type = "paired"
dataroot_gt = 'datasets/val/gt/'
dataroot_lq = 'datasets/val/lq/'

[val]
val_freq = 5000
#tile = 200
#[val.metrics.psnr]  # neosr 1.0.0 averages over one image too few and adds 1: two images or more, and compare runs only
#type = "calculate_psnr"

[path]
{pretrain}

[network_g]
type = "aether_{size_name}"
{network_options(kind, size, "", " = ")}
{discriminator}
[train]
{ema}
grad_clip = true

[train.optim_g]
type = "adamw"
lr = 1e-6  # {WHY_ONE_CYCLE}
betas = [ 0.9, 0.99 ]
weight_decay = 0  # {WHY_RATE}
{optim_d}
[train.scheduler]
type = "cosineannealing"
T_max = {kind.iterations // 2}  # half of total_iter
eta_min = {rate_of(kind, size)}
{losses}
[logger]
total_iter = {kind.iterations}
save_checkpoint_freq = 5000
use_tb_logger = true
#print_freq = 100
"""


def neosr_test(size_name: str, scale: int) -> str:
    return f"""# AetherNet {size_name} x{scale}: run a trained or fused model on a folder. Generated by generate_options.py.

name = "test_aether_{size_name}_x{scale}"
model_type = "image"
scale = {scale}

[datasets.test_1]
name = "val_1"
type = "single"
dataroot_lq = 'datasets/val/lq/'

[val]
#tile = 200

[network_g]
type = "aether_{size_name}"

[path]
pretrain_network_g = 'experiments/train_aether_{size_name}_x{scale}_fidelity/models/net_g_latest.pth'
"""


# ---------------------------------------------------------------------------------------------------------------------- BasicSR

BASICSR_MODEL = {"fidelity": "SRModel", "qat": "SRModel", "gan": "SRGANModel", "otf_fidelity": "RealESRNetModel", "otf_gan": "RealESRGANModel"}


def basicsr_train(size_name: str, scale: int, kind_name: str) -> str:
    size, kind = SIZES[size_name], KINDS[kind_name]
    parent = f"experiments/train_aether_{size_name}_x{scale}_{parent_of(kind_name)}/models/net_g_latest.pth"
    usm = "l1_gt_usm: false\npercep_gt_usm: false\ngan_gt_usm: false" if kind.gan else "gt_usm: false"
    otf = f"""
# degradation on the fly, as Real-ESRGAN; needs CUDA. The targets are not sharpened: that teaches halos.
{usm}
resize_prob: [0.2, 0.7, 0.1]  # up, down, keep
resize_range: [0.15, 1.5]
gaussian_noise_prob: 0.5
noise_range: [1, 30]
poisson_scale_range: [0.05, 3]
gray_noise_prob: 0.4
jpeg_range: [30, 95]
second_blur_prob: 0.8
resize_prob2: [0.3, 0.4, 0.3]
resize_range2: [0.3, 1.2]
gaussian_noise_prob2: 0.5
noise_range2: [1, 25]
poisson_scale_range2: [0.05, 2.5]
gray_noise_prob2: 0.4
jpeg_range2: [30, 95]
gt_size: {LQ_SIZE * scale}
queue_size: 192  # a multiple of the batch size
"""
    kernels = """
    blur_kernel_size: 21
    kernel_list: [iso, aniso, generalized_iso, generalized_aniso, plateau_iso, plateau_aniso]
    kernel_prob: [0.45, 0.25, 0.12, 0.03, 0.12, 0.03]
    sinc_prob: 0.1
    blur_sigma: [0.2, 3]
    betag_range: [0.5, 4]
    betap_range: [1, 2]
    blur_kernel_size2: 21
    kernel_list2: [iso, aniso, generalized_iso, generalized_aniso, plateau_iso, plateau_aniso]
    kernel_prob2: [0.45, 0.25, 0.12, 0.03, 0.12, 0.03]
    sinc_prob2: 0.1
    blur_sigma2: [0.2, 1.5]
    betag_range2: [0.5, 4]
    betap_range2: [1, 2]
    final_sinc_prob: 0.8
"""
    source = "    dataroot_lq: datasets/train/lq  # the same file names"
    if kind.otf:
        source = "    meta_info: datasets/train/meta_info.txt  # a file name of dataroot_gt a line"
    pretrain = f"pretrain_network_g: {parent}\n  param_key_g: params_ema" if kind.gan or kind.qat else "pretrain_network_g: ~"
    discriminator = "\nnetwork_d:\n  type: UNetDiscriminatorSN\n  num_in_ch: 3\n  num_feat: 64\n  skip_connection: true\n" if kind.gan else ""
    optim_d = """
  optim_d:
    type: Adam
    lr: !!float 1e-4
    weight_decay: 0
    betas: [0.9, 0.99]""" if kind.gan else ""  # fmt: skip
    gan = """
  perceptual_opt:
    type: PerceptualLoss
    layer_weights:
      'conv1_2': 0.1
      'conv2_2': 0.1
      'conv3_4': 1
      'conv4_4': 1
      'conv5_4': 1
    vgg_type: vgg19
    use_input_norm: true
    range_norm: false
    perceptual_weight: 1.0
    style_weight: 0
    criterion: l1
  gan_opt:
    type: GANLoss
    gan_type: vanilla
    real_label_val: 1.0
    fake_label_val: 0.0
    loss_weight: !!float 1e-1
  net_d_iters: 1
  net_d_init_iters: 0
""" if kind.gan else ""  # fmt: skip
    ema = f"ema_decay: 0.99  # {WHY_QAT_EMA}" if kind.qat else f"ema_decay: 0.999  # {WHY_EMA}"
    return f"""# AetherNet {size_name} x{scale}: {kind.title}. Generated by generate_options.py; copy it, then edit the copy.

# general settings
name: train_aether_{size_name}_x{scale}_{kind_name}
model_type: {BASICSR_MODEL[kind_name]}
scale: {scale}
num_gpu: 1  # 0: CPU; for more cards start it with torchrun, see docs/BasicSR.md
manual_seed: 0
{otf if kind.otf else ""}
# dataset and data loader settings
datasets:
  train:
    name: train
    type: {"RealESRGANDataset" if kind.otf else "PairedImageDataset"}
    dataroot_gt: datasets/train/gt
{source}
    io_backend:
      type: disk
{kernels if kind.otf else ""}
    gt_size: {LQ_SIZE * scale}  # {LQ_SIZE} low-resolution pixels; the receptive field is larger than 48
    use_hflip: true
    use_rot: true
    num_worker_per_gpu: 6
    batch_size_per_gpu: {size.batch}  # out of memory: halve it before gt_size{'' if kind.qat else SMALLER}
    dataset_enlarge_ratio: 1  # 100 with few images
    prefetch_mode: ~

  val:
    name: val
    type: PairedImageDataset
    dataroot_gt: datasets/val/gt
    dataroot_lq: datasets/val/lq
    io_backend:
      type: disk

# network structures
network_g:
  type: aether_{size_name}
  scale: {scale}
{network_options(kind, size, "  ", ": ")}
{discriminator}
# path
path:
  {pretrain}
  strict_load_g: true
  resume_state: ~

# training settings
train:
  {ema}
  optim_g:
    type: Adam  # the one that every version knows; without weight decay AdamW is the same
    lr: !!float {rate_of(kind, size)}
    weight_decay: 0  # {WHY_RATE}
    betas: [0.9, 0.99]{optim_d}

  scheduler:
    type: MultiStepLR
    milestones: {kind.milestones}
    gamma: 0.5

  total_iter: {kind.iterations}
  warmup_iter: {kind.warmup}  # {WHY_WARMUP}

  # losses
  pixel_opt:
    type: L1Loss
    loss_weight: 1.0
    reduction: mean
{gan}
# validation settings
val:
  val_freq: !!float 5e3
  save_img: true
  metrics:
    psnr:
      type: calculate_psnr
      crop_border: {scale}
      test_y_channel: false

# logging settings
logger:
  print_freq: 100
  save_checkpoint_freq: !!float 5e3
  use_tb_logger: true
  wandb:
    project: ~
    resume_id: ~

# dist training settings
dist_params:
  backend: nccl
  port: 29500
"""


def basicsr_test(size_name: str, scale: int) -> str:
    return f"""# AetherNet {size_name} x{scale}: run a trained or fused model on a folder. Generated by generate_options.py.

name: test_aether_{size_name}_x{scale}
model_type: SRModel
scale: {scale}
num_gpu: 1  # 0: CPU
manual_seed: 0

datasets:
  test_1:
    name: val
    type: SingleImageDataset
    dataroot_lq: datasets/val/lq
    io_backend:
      type: disk

network_g:
  type: aether_{size_name}
  scale: {scale}

path:
  pretrain_network_g: experiments/train_aether_{size_name}_x{scale}_fidelity/models/net_g_latest.pth
  param_key_g: params_ema  # 'params' in a file that fuse_aether.py wrote
  strict_load_g: true

val:
  save_img: true
  suffix: ~
"""


# ---------------------------------------------------------------------------------------------------------------------- writing


def tidy(text: str) -> str:
    """At most one empty line in a row, so that optional sections leave no holes."""
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text


def templates() -> Dict[Path, str]:
    """Every template: path below options/ and text."""
    files: List[Tuple[str, str]] = []
    for size in SIZES:
        for scale in SCALES:
            for kind in KINDS:
                if KINDS[kind].otf and scale == 3:  # all three degrade pictures whose size is no multiple of 3, and stop
                    continue
                redux_kind = kind.replace("otf", "OTF")
                files += [
                    (f"traiNNer-redux/train/AetherNet/AetherNet_{size}_x{scale}_{redux_kind}.yml", redux_train(size, scale, kind)),
                    (f"neosr/train_aether_{size}_x{scale}_{kind}.toml", neosr_train(size, scale, kind)),
                    (f"basicsr/train/AetherNet/train_aether_{size}_x{scale}_{kind}.yml", basicsr_train(size, scale, kind)),
                ]
            files += [
                (f"traiNNer-redux/test/AetherNet/AetherNet_{size}_x{scale}.yml", redux_test(size, scale)),
                (f"traiNNer-redux/onnx/AetherNet/AetherNet_{size}_x{scale}.yml", redux_onnx(size, scale)),
                (f"neosr/test_aether_{size}_x{scale}.toml", neosr_test(size, scale)),
                (f"basicsr/test/AetherNet/test_aether_{size}_x{scale}.yml", basicsr_test(size, scale)),
            ]
    return {Path(path): tidy(text) for path, text in files}


def stale() -> List[Path]:
    """Templates on disk that are missing, differ, or belong to no current one."""
    wanted = templates()
    changed = [path for path, text in wanted.items() if not (HERE / path).is_file() or (HERE / path).read_text(encoding="utf-8") != text]
    return changed + leftover(wanted)


def leftover(wanted: Dict[Path, str]) -> List[Path]:
    owned = {path.parent for path in wanted}
    found = [path.relative_to(HERE) for folder in owned if (HERE / folder).is_dir() for path in (HERE / folder).iterdir() if path.is_file()]
    return sorted(path for path in found if path not in wanted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a template is out of date")
    if parser.parse_args().check:
        outdated = stale()
        for path in outdated:
            print(f"options/{path.as_posix()} is not what generate_options.py writes: run it, or delete a file that is not its own", file=sys.stderr)
        return 1 if outdated else 0
    wanted = templates()
    for path, text in wanted.items():
        target = HERE / path
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        part.write_text(text, encoding="utf-8", newline="\n")
        os.replace(part, target)
    for path in leftover(wanted):
        print(f"options/{path.as_posix()} belongs to no template: delete or move it", file=sys.stderr)
    print(f"{len(wanted)} templates written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
