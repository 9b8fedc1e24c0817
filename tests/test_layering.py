"""The house keeps its floors: imports point down, siblings never know one another."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "finedetr"
GROUND = {"_version", "_env", "errors", "files", "geometry", "records", "detections"}
FLOORS = [
    GROUND,
    {"kernels"},
    {"model", "supervise", "data", "serve"},
    {"distill", "evaluate", "export"},
    {"train"},
    {"recipes"},
    {"cli"},
]
EXCEPTIONS = {("distill", "supervise"), ("export", "serve"), ("export", "evaluate")}
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FRONT_DOOR = {"__init__", "__main__", "api"}


def imported_rooms(path: Path) -> set[str]:
    """First-level names of finedetr that a file imports, wherever in the file."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"finedetr.{a.name}" for a in node.names] if node.module == "finedetr" else [node.module or ""]
        rooms |= {name.split(".")[1] for name in names if name.startswith("finedetr.")}
    return rooms


def imported_modules(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever in the file."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    return modules


def room_of(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0].removesuffix(".py")


FILES = sorted(p for p in SOURCE.rglob("*.py") if room_of(p) not in FRONT_DOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down_the_floors(path: Path) -> None:
    room = room_of(path)
    assert room in FLOOR_OF, f"{room} stands on no floor; draw it into FLOORS"
    for other in imported_rooms(path) - {room}:
        if other == "__version__":
            continue
        assert other in FLOOR_OF, f"{path}: imports finedetr.{other}, which stands on no floor"
        down = FLOOR_OF[other] < FLOOR_OF[room] or (room in GROUND and other in GROUND)
        assert down or (room, other) in EXCEPTIONS, f"{path.name}: {room} may not import {other}"


def test_no_file_needs_torchvision_or_opencv() -> None:
    for path in SOURCE.rglob("*.py"):
        rooted = {node.split(".")[0] for node in imported_modules(path)}
        assert not rooted & {"torchvision", "cv2", "timm"}, path


@pytest.mark.parametrize(
    ("module", "absent"), [("finedetr", ("torch", "numpy", "PIL")), ("finedetr.detections", ("torch",))]
)
def test_the_front_door_is_light(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*[m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [], f"import {module} loads {done.stdout}"
