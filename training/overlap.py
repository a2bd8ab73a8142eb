"""Look for test pictures among training cuts: whole, cropped, reduced, turned or compressed again.

    python training/overlap.py datasets/wallpapers/gt datasets/photographs datasets/Set5 datasets/Set14

Counts the SIFT keypoints (Lowe, IJCV 2004) of a cut that one shift, turn and enlargement maps into a test
picture, and prints the most similar pair of each test folder. Exit code 2 if a pair shares 12 or more.

Not found: mirrored pictures, cuts with fewer keypoints than that, and pictures that a test folder holds
twice, since a keypoint must be unlike all others of the folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, List, Optional, Tuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "archs")]

from aethersr.commands import Parser, exit_code  # noqa: E402, I001
import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from aethersr.errors import UserError, need  # noqa: E402
from aethersr.folders import find_pictures  # noqa: E402
from aethersr.quality import read_rgb  # noqa: E402

LEAST = 12  # of 3855 cuts and 95 test pictures, chance gave none more than 4
DISTINCT = 0.8  # Lowe's ratio: the nearest keypoint must be so much nearer than the second
KEYPOINTS = 2000  # of a picture at most
Pair = Tuple[int, Path, Path]  # keypoints in common, cut, picture


def keypoints(path: Path, flag: str) -> Tuple[Any, Any]:
    """Places (K, 2), x and y, and descriptors (K, 128), both float32."""
    import cv2

    grey = cv2.cvtColor(read_rgb(path, flag), cv2.COLOR_RGB2GRAY)
    found, descriptors = cv2.SIFT.create(KEYPOINTS).detectAndCompute(grey, None)
    places = np.array([each.pt for each in found], np.float32).reshape(-1, 2)
    return places, np.zeros((0, 128), np.float32) if descriptors is None else descriptors


class Folder:
    """The pictures of a test set, as one index of keypoints."""

    def __init__(self, folder: Path) -> None:
        import cv2

        self.files = find_pictures(folder, "TEST")
        places, descriptors = zip(*(keypoints(path, "TEST") for path in self.files))
        self.owner = np.repeat(np.arange(len(places)), [len(each) for each in places])
        self.places = np.concatenate(places)
        if len(self.places) < 2:
            raise UserError(f"{folder} has no pictures with details; pass other pictures (TEST).")
        self.index = cv2.FlannBasedMatcher({"algorithm": 1, "trees": 4}, {"checks": 32})
        self.index.add([np.concatenate(descriptors)])
        self.index.train()

    def nearest(self, cut: Path, places: Any, descriptors: Any) -> Pair:
        """The picture that shares most with a cut."""
        import cv2

        best = (0, cut, self.files[0])
        pairs = self.index.knnMatch(descriptors, k=2) if len(places) else []
        good = [a for a, b in pairs if a.distance < DISTINCT * b.distance]
        here, there = (np.array([getattr(m, side) for m in good], int) for side in ("queryIdx", "trainIdx"))
        for owner, count in zip(*np.unique(self.owner[there], return_counts=True)):
            if count > max(best[0], 2):
                mine = self.owner[there] == owner
                a, b = places[here[mine]], self.places[there[mine]]
                _, inside = cv2.estimateAffinePartial2D(a, b, ransacReprojThreshold=4)
                if inside is not None:  # different places there: else a pattern lies on one point
                    shared = len(np.unique(b[inside.ravel() > 0].round(), axis=0))
                    best = max(best, (shared, cut, self.files[owner]))
        return best


def overlap(args: argparse.Namespace) -> None:
    need("cv2", "overlap.py", "train")
    folders, cuts = [Folder(folder) for folder in args.tests], find_pictures(args.cuts, "CUTS")
    best = [(0, Path(), Path()) for _ in folders]
    for path in tqdm(cuts, unit="cut", disable=None):
        of = keypoints(path, "CUTS")
        best = [max(pair, test.nearest(path, *of)) for pair, test in zip(best, folders)]
    for name, folder, (shared, cut, picture) in zip(args.tests, folders, best):
        text = f"{shared} keypoints of {cut.name} in {picture.name}" if shared else "none"
        print(f"{name}: {len(folder.files)} pictures, {len(cuts)} cuts; most in common: {text}")
    shared, cut, picture = max(best)
    if shared >= LEAST:
        raise UserError(f"{cut} shows {picture}; leave out what it was cut from (CUTS).")


def main(argv: Optional[List[str]] = None) -> int:
    parser = Parser("overlap.py", __doc__)
    parser.add_argument("cuts", type=Path, metavar="CUTS", help="folder of training pictures")
    parser.add_argument("tests", type=Path, nargs="+", metavar="TEST", help="folder of test pictures")
    return exit_code("overlap.py", lambda: overlap(parser.parse(argv)), "nothing was compared.")


if __name__ == "__main__":
    sys.exit(main())
