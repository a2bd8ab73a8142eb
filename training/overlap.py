"""Look for test pictures among training cuts: whole, cropped, reduced, turned or compressed again.

    python training/overlap.py datasets/wallpapers/gt datasets/photographs datasets/Set5 datasets/Set14

Finds SIFT keypoints (Lowe, "Distinctive Image Features from Scale-Invariant Keypoints", IJCV 2004) of every
cut in every test picture, and counts those that one shift, turn and enlargement explain. Prints the most
similar pair of each test folder. Exit code 1 if a cut and a picture share ``--least`` keypoints or more.

Not found: mirrored pictures, cuts with fewer keypoints than that, and pictures that a test folder holds
twice, since a keypoint must be unlike all others of the folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, List, NamedTuple, Optional

import cv2
import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "archs")]

from aethersr.commands import exit_code  # noqa: E402
from aethersr.errors import UserError  # noqa: E402
from aethersr.quality import find_pictures, read_rgb  # noqa: E402

LEAST = 12  # of 3855 cuts and 95 test pictures, chance gave none more than 4
DISTINCT = 0.8  # Lowe's ratio: the nearest keypoint must be so much nearer than the second
KEYPOINTS = 2000  # of a picture at most


class Keypoints(NamedTuple):
    places: Any  # (K, 2) float32, x and y
    descriptors: Any  # (K, 128) float32


class Pair(NamedTuple):
    shared: int
    cut: Path
    picture: Path


def keypoints(path: Path, flag: str) -> Keypoints:
    grey = cv2.cvtColor(read_rgb(path, flag), cv2.COLOR_RGB2GRAY)
    found, descriptors = cv2.SIFT.create(KEYPOINTS).detectAndCompute(grey, None)
    places = np.array([each.pt for each in found], np.float32).reshape(-1, 2)
    return Keypoints(places, np.zeros((0, 128), np.float32) if descriptors is None else descriptors)


class Folder:
    """The pictures of a test set, as one index of keypoints."""

    def __init__(self, folder: Path) -> None:
        self.files = find_pictures(folder, "TEST")
        found = [keypoints(path, "TEST") for path in self.files]
        self.owner = np.repeat(np.arange(len(found)), [len(each.places) for each in found])
        self.places = np.concatenate([each.places for each in found])
        if len(self.places) < 2:
            raise UserError(f"{folder} has no pictures with details; pass other pictures (TEST).")
        self.index = cv2.FlannBasedMatcher({"algorithm": 1, "trees": 4}, {"checks": 32})
        self.index.add([np.concatenate([each.descriptors for each in found])])
        self.index.train()

    def nearest(self, cut: Path, of: Keypoints) -> Pair:
        """The picture that shares most with a cut."""
        best = Pair(0, cut, self.files[0])
        if not len(of.places):
            return best
        pairs = self.index.knnMatch(of.descriptors, k=2)
        good = [a for a, b in pairs if a.distance < DISTINCT * b.distance]
        here, there = (np.array([getattr(m, side) for m in good], int) for side in ("queryIdx", "trainIdx"))
        for owner, count in zip(*np.unique(self.owner[there], return_counts=True)):
            if count > max(best.shared, 2):
                mine = self.owner[there] == owner
                a, b = of.places[here[mine]], self.places[there[mine]]
                _, inside = cv2.estimateAffinePartial2D(a, b, ransacReprojThreshold=4)
                if inside is not None:  # different places there: else a pattern lies on one point
                    shared = len(np.unique(b[inside.ravel() > 0].round(), axis=0))
                    best = max(best, Pair(shared, cut, self.files[owner]))
        return best


def overlap(args: argparse.Namespace) -> int:
    folders = [Folder(folder) for folder in args.tests]
    best = [Pair(0, Path(), Path()) for _ in folders]
    cuts = find_pictures(args.cuts, "CUTS")
    for path in tqdm(cuts, unit="cut", disable=None):
        of = keypoints(path, "CUTS")
        best = [max(pair, test.nearest(path, of)) for pair, test in zip(best, folders)]
    for name, folder, pair in zip(args.tests, folders, best):
        text = f"{pair.shared} keypoints of {pair.cut.name} in {pair.picture.name}" if pair.shared else "none"
        print(f"{name}: {len(folder.files)} pictures, {len(cuts)} cuts; most in common: {text}")
    return int(max(best).shared >= args.least)


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("cuts", type=Path, metavar="CUTS", help="folder of training pictures")
    parser.add_argument("tests", type=Path, nargs="+", metavar="TEST", help="folder of test pictures")
    parser.add_argument("--least", type=int, default=LEAST, help="keypoints that count (default: 12)")
    args = parser.parse_args(argv)
    found: List[int] = []
    code = exit_code("overlap.py", lambda: found.append(overlap(args)), "nothing was written.")
    return code or found[0]


if __name__ == "__main__":
    sys.exit(main())
