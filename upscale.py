"""Upscale pictures of any size with an AetherNet: a file, or every picture in a folder.

    python upscale.py --model 4x_MyModel_fused.safetensors --input photo.png --output photo_4x.png
    python upscale.py --model 4x_MyModel_fp16.onnx --input folder --output upscaled

Takes weights of every form (.pth, .safetensors; int8 ones compute as they were calibrated) and every ONNX file of fuse_aether.py, those of one
fixed size too.
PNG, JPEG, WebP, TIFF and BMP; 16 bits, transparency, greyscale, colour profile and upright orientation are kept. The network sees one tile
at a time, so memory for it does not grow with the picture. From Python: ``upscale_tiled(net, image)``. Needs torch, numpy, pillow and tqdm;
onnx and onnxruntime for .onnx files; opencv-python for 16 bits, since Pillow has no 16-bit colour.

Version 0.1.0. Source: https://github.com/phhofm (AetherNet by Philip Hofmann). Licence: MIT.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fuse_aether import UserError, exit_code, first_line, read_state  # puts archs/ on the path

from aether_arch import AetherBase, AetherNet, aether_from_state_dict  # isort: skip

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP"}
SAVE_OPTIONS: Dict[str, Dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
    "TIFF": {"compression": "tiff_adobe_deflate"},
}
LEVELS = {torch.uint8: 255, getattr(torch, "uint16", None): 65535}  # PyTorch before 2.3 has no uint16
Network = Callable[[Tensor], Tensor]


# ----------------------------------------------------------------------------------------------------------------- tiles


def receptive_field(net: AetherBase) -> int:
    """How many pixels away an input pixel may lie and still change an output pixel, channel attention aside."""
    options = net.options
    block = options["lk_kernel"] // 2 + (3 if options["use_spatial_attn"] else 0)
    return 1 + sum(options["depths"]) * block + 1 + 1 + 2  # first and two last 3x3, blocks between them, upsampling as one 5x5


def _cuts(size: int, tile: int, overlap: int) -> List[Tuple[int, int, int, int]]:
    """Even parts of at most ``tile``, as (begin, end, begin with overlap, end with overlap); a picture's border stays a border."""
    count = math.ceil(size / tile)
    edges = [size * k // count for k in range(count + 1)]
    return [(begin, end, max(0, begin - overlap), min(size, end + overlap)) for begin, end in zip(edges, edges[1:])]


def _fixed_cuts(size: int, tile: int, overlap: int) -> List[Tuple[int, int, int, int]]:
    """The same for a network that takes ``tile`` pixels and no other number: tiles lie inside the picture, so its borders stay borders."""
    if size <= tile:
        return [(0, size, 0, size)]
    count = math.ceil((size - 2 * overlap) / (tile - 2 * overlap))
    begins = [(size - tile) * k // (count - 1) for k in range(count)]
    edges = [0, *((begin + tile + after) // 2 for begin, after in zip(begins, begins[1:])), size]  # in the middle of what two tiles share
    return [(edge, end, begin, begin + tile) for edge, end, begin in zip(edges, edges[1:], begins)]


@torch.no_grad()
def upscale_tiled(
    net: Network,
    image: Tensor,
    tile: int = 512,
    overlap: Optional[int] = None,
    out: Optional[Tensor] = None,
    progress: Callable[[Iterator[Any], int], Iterator[Any]] = lambda tiles, count: tiles,
    size: Optional[Tuple[int, int]] = None,
) -> Tensor:
    """The network's output for a picture of any size, computed tile by tile: (N, C, H, W) -> (N, C, scale * H, scale * W).

    With the default overlap there are no seams and the result is that of one call, rounding aside. Channel attention is the exception:
    it averages over what the network is shown, a tile with its overlap and not the picture, so tiles differ a little from one call and from
    each other. Such networks (aether_medium, aether_large) are nearest to one call with few, large tiles; docs/speed.md has figures.

    Args:
        net: an AetherNet in any form and in evaluation mode, or any function from a batch to its upscaled batch.
        image: floating point in [0, 1], or uint8 or uint16 over their whole range; may lie on another device than the network.
        tile: largest height and width of a tile in input pixels, overlap not counted.
        overlap: input pixels around a tile that the network sees too. Default: the network's receptive field, which must be an AetherNet's
            then. A smaller one is faster and may leave seams.
        out: written to and returned; e.g. over a numpy.memmap. Default: a new tensor. Of image's dtype, values of integers are rounded.
        progress: wraps the iterator over tiles, given their number.
        size: (height, width) of the only input that the network takes; ``tile`` does not matter then. A smaller picture is continued to the
            right and below with its last pixels, and differs a little there from what a network of any size makes of it.

    Raises:
        ValueError: an argument is impossible, the network is in training mode, or its output is not finite.
    """
    if isinstance(net, AetherNet) and net.training:
        raise ValueError("upscale_tiled: the network is in training mode and would normalise each tile by its own statistics; call net.eval().")
    if overlap is None:
        if not isinstance(net, AetherBase):
            raise ValueError("upscale_tiled: overlap is needed for a network that is not an AetherNet; pass its receptive field in pixels.")
        overlap = receptive_field(net)
    if tile < 1 or overlap < 0:
        raise ValueError(f"upscale_tiled: tile={tile} and overlap={overlap} are not possible; expected tile >= 1 and overlap >= 0.")
    if size is not None and any(2 * overlap >= side < length for side, length in zip(size, image.shape[2:])):
        raise ValueError(f"upscale_tiled: overlap={overlap} leaves nothing of tiles of {size[1]}x{size[0]}; expected {(min(size) - 1) // 2} or less.")
    if image.dim() != 4 or image.numel() == 0 or not (image.is_floating_point() or image.dtype in LEVELS):
        raise ValueError(f"upscale_tiled: image {tuple(image.shape)} {image.dtype} is not possible; expected (N, C, H, W), floats, uint8 or uint16.")
    like = next(net.parameters(), None) if isinstance(net, nn.Module) else None
    rows, columns = (
        _cuts(length, tile, overlap) if size is None else _fixed_cuts(length, side, overlap) for length, side in zip(image.shape[2:], size or (0, 0))
    )
    tiles = ((row, column) for row in rows for column in columns)
    for (top, bottom, y0, y1), (left, right, x0, x1) in progress(tiles, len(rows) * len(columns)):
        crop = image[:, :, y0:y1, x0:x1]
        if like is not None:
            crop = crop.to(like.device)
        if image.dtype in LEVELS:
            crop = crop.float() / LEVELS[image.dtype]
        if size is not None:
            crop = F.pad(crop, (0, size[1] - crop.shape[3], 0, size[0] - crop.shape[2]), "replicate")
        result = net(crop if like is None else crop.to(like.dtype))
        scale = result.shape[-1] // crop.shape[-1]
        result = result[..., (top - y0) * scale : (bottom - y0) * scale, (left - x0) * scale : (right - x0) * scale]
        if not bool(torch.isfinite(result).all()):
            raise ValueError("upscale_tiled: the network's output is not finite (half precision is too coarse for it, or its weights are broken).")
        if image.dtype in LEVELS:
            result = (result.float().clamp(0, 1) * LEVELS[image.dtype]).round()
        if out is None:
            out = torch.empty(*result.shape[:2], image.shape[2] * scale, image.shape[3] * scale, dtype=image.dtype, device=image.device)
        out[:, :, top * scale : bottom * scale, left * scale : right * scale] = result.to(out.device, out.dtype)
    assert out is not None  # there is at least one tile
    return out


# -------------------------------------------------------------------------------------------------------------- networks


class OnnxNetwork:
    """An exported AetherNet as a function of tensors."""

    def __init__(self, path: Path, device: str) -> None:
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise UserError(f"{path} needs the package {error.name}: pip install onnx onnxruntime, or pass weights (--model).") from None
        provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise UserError(f"--device cuda was given, but this ONNX Runtime has no {provider}: pip install onnxruntime-gpu, or pass --device cpu.")
        try:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4  # what fails is said once, by this command
            self.session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
            self.overlap = self._receptive_field(onnx.load(str(path)).graph)
        except Exception as error:
            raise UserError(f"{path} is not a readable ONNX file ({first_line(error)}); export it again (--model).") from None
        source = self.session.get_inputs()[0]
        self.name, self.dtype = source.name, {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}.get(source.type)
        if self.dtype is None or len(source.shape) != 4 or not isinstance(source.shape[1], int):
            raise UserError(f"{path} takes {source.type} {source.shape}, expected float (batch, channels, height, width); export it again (--model).")
        self.in_chans: int = source.shape[1]
        fixed = [isinstance(side, int) for side in source.shape]
        if fixed[2] != fixed[3] or (fixed[0] and source.shape[0] != 1) or len(self.session.get_inputs()) > 1:
            raise UserError(f"{path} takes {[value.shape for value in self.session.get_inputs()]}, expected pictures of any size, or one picture of "
                            "one size; export it again (--model).")  # fmt: skip
        self.one_by_one = fixed[0]
        self.size: Optional[Tuple[int, int]] = tuple(source.shape[2:]) if fixed[2] else None
        height, width = self.size or (8, 8)
        try:
            shape = self(torch.zeros(1, self.in_chans, height, width)).shape
        except Exception as error:  # ONNX Runtime's are of many kinds
            raise UserError(f"{path} does not run ({first_line(error)}); export it again (--model).") from None
        scale = shape[-1] // width if len(shape) == 4 else 0
        if tuple(shape) != (1, self.in_chans, height * scale, width * scale) or scale < 1:
            raise UserError(f"{path} turns {width}x{height} pixels into {tuple(shape)}, expected a network that upscales pictures (--model).")
        self.seams = self.size is not None and 8 * self.overlap > 3 * min(self.size)  # else more than a dozen times the picture's own work
        if self.seams:
            self.overlap = min(height, width) // 4

    @staticmethod
    def _receptive_field(graph: Any) -> int:
        """Along the longest path: a convolution of size k sees k // 2 pixels around its own (the pixel shuffle is at the very end)."""
        reach: Dict[str, int] = {}
        for node in graph.node:  # ONNX wants them sorted: inputs come first
            kernel = next((attribute.ints for attribute in node.attribute if attribute.name == "kernel_shape"), [1])
            seen = max((reach.get(name, 0) for name in node.input), default=0) + max(kernel) // 2
            reach.update(dict.fromkeys(node.output, seen))
        return max(reach.values())

    def __call__(self, image: Tensor) -> Tensor:
        batches = image.split(1) if self.one_by_one else [image]
        results = [self.session.run(None, {self.name: batch.to(self.dtype).numpy()})[0] for batch in batches]
        return torch.from_numpy(np.concatenate(results)).to(image.dtype)


def load_network(path: Path, device: str, fp16: bool) -> Tuple[Network, int, int]:
    """The network in the file, its number of channels and the overlap that its tiles need."""
    if path.suffix.lower() == ".onnx":
        if fp16:
            raise UserError(f"--fp16 can't change {path}; export the network with precision fp16, or leave --fp16 out.")
        if not os.path.isfile(path):
            raise UserError(f"{path} {'is not a file' if os.path.exists(path) else 'does not exist'}; pass the network with --model.")
        session = OnnxNetwork(path, device)
        if session.seams:
            print(f"{path} takes {session.size[1]}x{session.size[0]} pixels, too few for tiles without seams; export it with a larger --static.")
        return session, session.in_chans, session.overlap
    try:
        net = aether_from_state_dict(read_state(path)[0])
        if not getattr(net, "stored", False):
            net = net.fused()
        elif fp16:
            raise UserError(f"--fp16 can't change {path}, whose int8 weights are rounded in float32; leave --fp16 out.")
    except UserError as error:
        raise UserError(str(error).replace("--model_path", "--model").replace(".pth or .safetensors", ".pth, .safetensors or .onnx")) from None
    except ValueError as error:
        raise UserError(f"{path}: {error} Pass the weights of an AetherNet (--model).") from None
    net = net.to(device, memory_format=torch.channels_last)  # the faster layout on CPU, and with fp16 on CUDA
    return net.half() if fp16 else net, net.options["in_chans"], receptive_field(net)


def of_any_channels(net: Network, in_chans: int, alpha: bool) -> Network:
    """``net`` for pictures with other channels: each of those goes through alone, as a grey picture, and comes back as their mean.

    Transparency too, so that its edges are as sharp as those of the colours beside it; interpolated it would leave a soft fringe.
    """

    def alone(x: Tensor) -> Tensor:
        grey = x.reshape(-1, 1, *x.shape[2:]).expand(-1, in_chans, -1, -1)
        out = net(grey).mean(1)
        return out.view(*x.shape[:2], *out.shape[1:])

    def run(x: Tensor) -> Tensor:
        colours = x.shape[1] - alpha
        out = (net if colours == in_chans else alone)(x[:, :colours])
        return torch.cat([out, alone(x[:, colours:])], 1) if alpha else out

    return run


# -------------------------------------------------------------------------------------------------------------- pictures


class Picture:
    """Pixels (H, W, C) in uint8 or uint16, whether the last channel is transparency, and the colour profile, if any."""

    def __init__(self, pixels: np.ndarray, alpha: bool, profile: Optional[bytes]) -> None:
        self.pixels, self.alpha, self.profile = pixels, alpha, profile

    @classmethod
    def read(cls, path: Path) -> Picture:
        try:
            with Image.open(path, formats=sorted(set(FORMATS.values()))) as image:
                if getattr(image, "n_frames", 1) > 1:
                    raise UserError(f"{path} holds {image.n_frames} pictures, expected one; split it (--input).")
                profile = image.info.get("icc_profile")
                if ";16" in str(image.tile):  # Pillow's name of what the file stores, whatever it would make of it
                    image.load()  # raises where the file is cut or damaged, which OpenCV fills with black
                    return cls._read_16_bit(path, image, profile)
                image = ImageOps.exif_transpose(image)
                if image.mode not in ("L", "LA", "RGB", "RGBA", "1", "P", "PA", "CMYK", "YCbCr"):
                    raise UserError(f"{path} holds pixels of type {image.mode}, expected 8 or 16 bits a channel (--input).")
                grey = image.mode in ("1", "L", "LA")
                mode = ("L" if grey else "RGB") + ("A" if image.has_transparency_data else "")
                profile = None if image.mode in ("CMYK", "YCbCr") else profile  # it describes other colours than RGB then
                pixels = np.array(image.convert(mode))
        except UserError:
            raise
        except Exception as error:  # Pillow's readers raise many kinds
            raise UserError(f"{path} is not a readable picture ({first_line(error)}); expected one of {', '.join(FORMATS)} (--input).") from None
        return cls(pixels.reshape(*pixels.shape[:2], -1), mode.endswith("A"), profile)

    @classmethod
    def _read_16_bit(cls, path: Path, image: Image.Image, profile: Optional[bytes]) -> Picture:
        pixels = _opencv().imdecode(np.fromfile(path, np.uint8), -1)  # -1: as stored; a path would not do for names beyond ASCII on Windows
        if pixels is None or pixels.dtype != np.uint16:
            raise UserError(f"{path} is not a 16-bit picture that OpenCV can read; save it as a plain PNG or TIFF (--input).")
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        if image.format == "PNG":  # OpenCV turns TIFF upright itself
            turn = image.getexif().get(0x0112, 1)
            pixels = pixels.swapaxes(0, 1) if turn >= 5 else pixels
            pixels = pixels[:: -1 if turn in (3, 4, 7, 8) else 1, :: -1 if turn in (2, 3, 6, 7) else 1]
        if pixels.shape[2] >= 3:
            pixels = pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]  # OpenCV has blue first
        return cls(np.ascontiguousarray(pixels), pixels.shape[2] in (2, 4), profile)

    def encode(self, kind: str) -> bytes:
        if self.pixels.dtype == np.uint16:
            cv2 = _opencv()
            pixels = self.pixels[..., [2, 1, 0, 3][: self.pixels.shape[2]]] if self.pixels.shape[2] >= 3 else self.pixels
            if self.profile and kind == "PNG":
                return cv2.imencodeWithMetadata(".png", pixels, [cv2.IMAGE_METADATA_ICCP], [np.frombuffer(self.profile, np.uint8)])[1].tobytes()
            return cv2.imencode(f".{kind.lower()}", pixels)[1].tobytes()
        buffer = io.BytesIO()
        image = Image.fromarray(self.pixels[..., 0] if self.pixels.shape[2] == 1 else self.pixels)
        image.save(buffer, kind, icc_profile=self.profile, **SAVE_OPTIONS.get(kind, {}))
        return buffer.getvalue()


def _opencv() -> Any:
    try:
        import cv2

        cv2.utils.logging.setLogLevel(0)  # else it writes about files, valid ones too, to the standard error
    except ImportError:
        raise UserError("a 16-bit picture needs the package opencv-python: pip install opencv-python, or pass 8-bit pictures (--input).") from None
    return cv2


def check_kind(source: Path, target: Path) -> str:
    """Pillow's name of the format to write; looks at the head of the source alone, so that a long run does not end in this error."""
    kind = FORMATS[target.suffix.lower()]
    try:
        with Image.open(source) as image:
            deep, clear = ";16" in str(image.tile), image.has_transparency_data
    except Exception:
        return kind  # reading it will say what is wrong
    if deep and kind not in ("PNG", "TIFF"):
        raise UserError(f"{source} has 16 bits a channel, which {target.name} can't hold; pass an --output that ends in .png or .tif.")
    if clear and kind in ("JPEG", "BMP"):
        raise UserError(f"{source} has transparency, which {target.name} can't hold; pass an --output that ends in .png, .webp or .tif.")
    return kind


def upscale_file(net: Network, in_chans: int, source: Path, target: Path, tile: int, overlap: int) -> None:
    kind = check_kind(source, target)
    picture = Picture.read(source)
    pixels, opaque = picture.pixels, None
    if picture.alpha and pixels[..., -1].min() == pixels[..., -1].max():  # most often all opaque: no work, and nothing may become 254
        pixels, opaque = pixels[..., :-1], pixels[0, 0, -1]
    run = of_any_channels(net, in_chans, picture.alpha and opaque is None)
    like = next(net.parameters()) if isinstance(net, nn.Module) else torch.zeros(())
    height, width, channels = pixels.shape
    size = net.size if isinstance(net, OnnxNetwork) else None
    probe = torch.zeros(1, channels, *(size or (1, 1)), device=like.device, dtype=like.dtype)
    scale = run(probe).shape[-1] // probe.shape[-1]
    upscaled = np.empty((height * scale, width * scale, channels + (opaque is not None)), pixels.dtype)
    if opaque is not None:
        upscaled[..., -1] = opaque

    def planes(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).permute(2, 0, 1)[None]

    def bar(tiles: Iterator[Any], count: int) -> Iterator[Any]:
        return iter(tqdm(tiles, total=count, desc=source.name, unit="tile", disable=None if sys.stderr else True))

    upscale_tiled(lambda crop: run(crop.to(like.device, like.dtype)), planes(pixels), tile, overlap, planes(upscaled[..., :channels]), bar, size)
    part = target.with_name(f"{target.stem[:40]}.{os.getpid()}.part{target.suffix}")  # a longer name than target's may be too long
    try:
        part.write_bytes(Picture(upscaled, picture.alpha, picture.profile).encode(kind))
        os.replace(part, target)
    except OSError as error:
        raise UserError(f"{target} can't be written: {error.strerror or error}; free space or pass another --output.") from None
    except Exception as error:  # Pillow and OpenCV: most often more pixels than the format allows
        raise UserError(f"{target} can't be written: {first_line(error)}; try an --output that ends in .png or .tif.") from None
    finally:
        if os.path.exists(part):
            part.unlink()
    print(f"Wrote {target} ({width * scale}x{height * scale})")


# ------------------------------------------------------------------------------------------------------------------ main


def pairs(source: Path, target: Path, overwrite: bool) -> List[Tuple[Path, Path]]:
    """Every picture with the file that it becomes, after checks."""
    if not os.path.exists(source):  # not source.exists(): before Python 3.14 that raises for a name that is too long
        raise UserError(f"{source} does not exist; pass a picture or a folder with --input.")
    if not (source.is_dir() or source.is_file()):
        raise UserError(f"{source} is neither a file nor a folder; pass a picture or a folder with --input.")
    if source.is_dir():
        if os.path.isfile(target):
            raise UserError(f"{target} is a file, but {source} is a folder; pass a folder with --output.")
        try:
            names = sorted(os.listdir(source))
        except OSError as error:
            raise UserError(f"{source} can't be read: {error.strerror}; pass another folder with --input.") from None
        found = [(source / name, target / name) for name in names if Path(name).suffix.lower() in FORMATS and (source / name).is_file()]
        if not found:
            raise UserError(f"{source} holds no picture; expected files that end in {', '.join(FORMATS)} (--input).")
    else:
        found = [(source, target / source.name if os.path.isdir(target) else target)]
        if found[0][1].suffix.lower() not in FORMATS:
            raise UserError(f"{found[0][1]} ends in {found[0][1].suffix or 'nothing'!r}; expected one of {', '.join(FORMATS)} (--output).")
    folder = target if source.is_dir() else found[0][1].parent
    if not os.path.isdir(folder.parent) or not (os.path.isdir(folder) or source.is_dir()):
        raise UserError(f"the folder {folder if not source.is_dir() else folder.parent} does not exist; make it or pass another --output.")
    for path, result in found:
        if os.path.isdir(result):
            raise UserError(f"{result} is a folder, expected a file name; pass another --output.")
        if os.path.exists(result) and not os.path.isfile(result):
            raise UserError(f"{result} is a pipe or a device, expected a file name; pass another --output.")
        if os.path.exists(result) and os.path.samefile(path, result):
            raise UserError(f"{result} is the input itself, which is never overwritten; pass another --output.")
        if os.path.lexists(result) and not overwrite:  # a link to nothing is something too
            raise UserError(f"{result} exists; pass --overwrite to replace it, or another --output.")
    return found


def upscale(args: argparse.Namespace) -> None:
    """What the command does; raises UserError."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was given, but PyTorch finds no CUDA device; pass --device cpu.")
    if args.fp16 and args.device == "cpu":
        raise UserError("--fp16 is slower than float32 on a CPU; pass --device cuda, or leave --fp16 out.")
    if args.tile < 1:
        raise UserError(f"--tile {args.tile} is not possible; expected 1 or more pixels.")
    if args.overlap is not None and args.overlap < 0:
        raise UserError(f"--overlap {args.overlap} is not possible; expected 0 or more pixels.")
    Image.MAX_IMAGE_PIXELS = 2**29  # Pillow refuses twice as many; its own limit is for pictures sent by strangers
    source, target = Path(args.input), Path(args.output)
    todo = pairs(source, target, args.overwrite)
    net, in_chans, overlap = load_network(Path(args.model), args.device, args.fp16)
    if source.is_dir():
        try:
            target.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{target} can't be made: {error.strerror}; pass another --output.") from None
    failed: List[str] = []
    for path, result in todo:
        try:
            upscale_file(net, in_chans, path, result, args.tile, overlap if args.overlap is None else args.overlap)
        except (UserError, ValueError) as error:
            failed.append(str(error))
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            failed.append(f"{path}: there is not enough memory; pass a smaller --tile than {args.tile}, or a smaller picture.")
    if failed:
        if len(failed) < len(todo):
            failed.append(f"{len(failed)} of {len(todo)} pictures failed, the others are written.")
        raise UserError("\nupscale.py: error: ".join(failed))


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", required=True, help="weights (.pth, .safetensors; fused or not) or an exported network (.onnx)")
    parser.add_argument("--input", required=True, help="a picture, or a folder whose pictures are all upscaled (not those of folders in it)")
    parser.add_argument("--output", required=True, help="the picture to write, or a folder: names and formats stay the same then")
    parser.add_argument("--tile", type=int, default=512, help="largest side of a tile in input pixels; smaller takes less memory (default: 512). "
                        "An ONNX file of fixed size has its own")  # fmt: skip
    parser.add_argument("--overlap", type=int, help="pixels around a tile that the network sees too (default: enough for no seams)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--fp16", action="store_true", help="half precision, on CUDA only")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    return exit_code("upscale.py", lambda: upscale(parse_args(argv)), "the picture in work was not written.")


if __name__ == "__main__":
    sys.exit(main())
