"""Meshes and strands by formula."""

import math
from collections.abc import Sequence
from typing import Any

import bpy
import numpy as np

TURNS = 64  # segments around an axis


def placed(data: Any, name: str = "thing", material: Any = None) -> Any:
    made = bpy.data.objects.new(name, data)
    bpy.context.scene.collection.objects.link(made)
    if material is not None:
        data.materials.append(material)
    return made


def mesh(
    points: np.ndarray, faces: Sequence[Sequence[int]], material: Any = None, smooth: bool = True
) -> Any:
    data = bpy.data.meshes.new("mesh")
    data.from_pydata(points.tolist(), [], [list(face) for face in faces])
    data.shade_smooth() if smooth else data.shade_flat()
    return placed(data, material=material)


def grid_faces(rows: int, columns: int, around: bool = False) -> list[tuple[int, int, int, int]]:
    """Returns the faces of points in row order; around: the last column meets the first."""
    last = columns if around else columns - 1
    return [
        (i * columns + j, i * columns + (j + 1) % columns,
         (i + 1) * columns + (j + 1) % columns, (i + 1) * columns + j)
        for i in range(rows - 1) for j in range(last)
    ]  # fmt: skip


def grid(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns u (along columns) and v (along rows) in [0, 1], each flat in row order."""
    v, u = np.mgrid[0 : 1 : rows * 1j, 0 : 1 : columns * 1j]
    return u.ravel(), v.ravel()


def with_uv(thing: Any, u: np.ndarray, v: np.ndarray) -> Any:
    """Adds texture coordinates by vertex."""
    data = thing.data
    layer = data.uv_layers.new(name="UVMap")
    corners = np.empty(len(data.loops), np.int32)
    data.loops.foreach_get("vertex_index", corners)
    layer.data.foreach_set("uv", np.stack((u, v), 1)[corners].astype(np.float32).ravel())
    return thing


def reshape(thing: Any, points: np.ndarray) -> None:
    thing.data.vertices.foreach_set("co", points.astype(np.float32).ravel())
    thing.data.update()


def lathe(profile: Sequence[tuple[float, float]], material: Any = None, smooth: int = 4) -> Any:
    """Makes a solid of revolution about z. profile: (radius, height) from axis to axis; smooth:
    points that a spline puts between two of them."""
    points = np.array(profile, float)
    if smooth > 1:
        points = spline(points, smooth)
    angle = np.linspace(0, 2 * math.pi, TURNS, endpoint=False)
    ring = np.stack((np.cos(angle), np.sin(angle)), 1)
    radius, height = np.maximum(points[:, 0], 1e-4), points[:, 1]
    xy = radius[:, None, None] * ring
    z = np.broadcast_to(height[:, None, None], (*xy.shape[:2], 1))
    made = mesh(np.concatenate((xy, z), 2).reshape(-1, 3), grid_faces(len(points), TURNS, True),
        material)  # fmt: skip
    outward(made)
    return made


def outward(thing: Any) -> None:
    """Normals point out of the solid."""
    import bmesh

    made = bmesh.new()
    made.from_mesh(thing.data)
    bmesh.ops.recalc_face_normals(made, faces=made.faces)
    made.to_mesh(thing.data)
    made.free()


def spline(points: np.ndarray, between: int) -> np.ndarray:
    """Draws a curve through points, Catmull and Rom 1974; a point that is given twice stays a
    corner."""
    before = np.concatenate((points[:1], points, points[-1:]))
    out = []
    for a, b, c, d in zip(before, before[1:], before[2:], before[3:], strict=False):
        t = np.arange(between)[:, None] / between
        out.append(
            0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2
                + (3 * b - a - 3 * c + d) * t**3)
        )  # fmt: skip
    return np.concatenate((*out, points[-1:]))


def primitive(kind: str, material: Any = None, smooth: bool = True, **settings: Any) -> Any:
    """Makes one of Blender's own: uv_sphere, ico_sphere, torus, cube, cylinder, cone, monkey,
    plane."""
    getattr(bpy.ops.mesh, f"primitive_{kind}_add")(**settings)
    made = bpy.context.active_object
    if smooth:
        made.data.shade_smooth()
    if material is not None:
        made.data.materials.append(material)
    return made


def modified(thing: Any, kind: str, **settings: Any) -> Any:
    modifier = thing.modifiers.new(kind, kind)
    for name, value in settings.items():
        setattr(modifier, name, value)
    return thing


def extruded(outline: np.ndarray, depth: float, material: Any = None) -> Any:
    """Makes a prism of the outline (N, 2) in x and z, with rounded edges."""
    n = len(outline)
    front = np.column_stack((outline[:, 0], np.full(n, -depth / 2), outline[:, 1]))
    back = front + (0, depth, 0)
    sides = [(i, (i + 1) % n, n + (i + 1) % n, n + i) for i in range(n)]
    faces = [tuple(range(n)), tuple(range(2 * n - 1, n - 1, -1)), *sides]
    made = mesh(np.concatenate((front, back)), faces, material, smooth=False)
    outward(made)
    return modified(made, "BEVEL", width=0.04, segments=3, limit_method="ANGLE")


def strands(points: np.ndarray, radius: np.ndarray, material: Any = None) -> Any:
    """Makes hair curves. points: (N, K, 3); radius: (K,) or (N, K)."""
    count, knots = points.shape[:2]
    data = bpy.data.hair_curves.new("strands")
    data.add_curves([knots] * count)
    thing = placed(data, material=material)
    restrand(thing, points)
    set_radius(thing, np.broadcast_to(radius, (count, knots)))
    return thing


def restrand(thing: Any, points: np.ndarray) -> None:
    thing.data.attributes["position"].data.foreach_set("vector", points.astype(np.float32).ravel())
    thing.data.update_tag()


def set_radius(thing: Any, radius: np.ndarray) -> None:
    attributes = thing.data.attributes
    made = attributes.get("radius") or attributes.new("radius", "FLOAT", "POINT")
    made.data.foreach_set("value", radius.astype(np.float32).ravel())


def tubes(paths: Sequence[np.ndarray], radius: float, material: Any, closed: bool = False) -> Any:
    """Makes round wires along points (K, 3)."""
    data = bpy.data.curves.new("wire", "CURVE")
    data.dimensions, data.bevel_depth, data.bevel_resolution = "3D", radius, 3
    for path in paths:
        line = data.splines.new("POLY")
        line.points.add(len(path) - 1)
        line.points.foreach_set("co", np.column_stack((path, np.ones(len(path)))).ravel())
        line.use_cyclic_u = closed
    return placed(data, material=material)
