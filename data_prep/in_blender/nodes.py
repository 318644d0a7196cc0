"""Nodes of Blender's shaders, in a line each."""

from typing import Any

import bpy

Color = tuple[float, float, float, float]


def add(tree: Any, kind: str, inputs: dict[Any, Any] | None = None, **settings: Any) -> Any:
    """Adds a node. inputs: name or number of a socket -> a value, or the output that it is linked
    to."""
    node = tree.nodes.new(kind)
    for name, value in settings.items():
        setattr(node, name, value)
    for name, value in (inputs or {}).items():
        if isinstance(value, bpy.types.NodeSocket):
            tree.links.new(value, node.inputs[name])
        else:
            node.inputs[name].default_value = value
    return node


def math(tree: Any, operation: str, *values: Any) -> Any:
    return add(tree, "ShaderNodeMath", dict(enumerate(values)), operation=operation).outputs[0]


def scaled(tree: Any, value: Any, span: tuple[float, ...], smooth: bool = True) -> Any:
    """Maps a value from one span to another. span: from low, from high, to low, to high."""
    names = ("From Min", "From Max", "To Min", "To Max")
    inputs = {"Value": value, **dict(zip(names, span, strict=True))}
    kind = "SMOOTHSTEP" if smooth else "LINEAR"
    return add(tree, "ShaderNodeMapRange", inputs, interpolation_type=kind).outputs[0]


def ramp(tree: Any, value: Any, stops: list[tuple[float, Color]]) -> Any:
    node = add(tree, "ShaderNodeValToRGB", {0: value})
    elements = node.color_ramp.elements
    while len(elements) < len(stops):
        elements.new(1.0)
    for element, (place, color) in zip(elements, stops, strict=True):
        element.position, element.color = place, color
    return node.outputs[0]


def mixed(tree: Any, share: Any, first: Any, second: Any) -> Any:
    """Mixes two shaders."""
    return add(tree, "ShaderNodeMixShader", {0: share, 1: first, 2: second}).outputs[0]


def material(name: str) -> tuple[Any, Any]:
    """Makes a material without nodes, and returns it with the tree of its nodes."""
    made = bpy.data.materials.new(name)
    made.use_nodes = True
    made.node_tree.nodes.clear()
    return made, made.node_tree


def output(tree: Any, surface: Any = None, volume: Any = None) -> None:
    sockets = {"Surface": surface, "Volume": volume}
    add(tree, "ShaderNodeOutputMaterial", {name: s for name, s in sockets.items() if s})


def linear(code: str, alpha: float = 1.0) -> Color:
    """Returns a colour such as c0ffee in linear light."""
    encoded = [int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    light = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in encoded]
    return light[0], light[1], light[2], alpha


def principled(name: str, color: Any, **inputs: Any) -> Any:
    """Makes a material of the Principled BSDF. inputs: its sockets, _ for a space."""
    made, tree = material(name)
    sockets = {key.replace("_", " "): value for key, value in inputs.items()}
    shader = add(tree, "ShaderNodeBsdfPrincipled", {"Base Color": color, **sockets})
    output(tree, shader.outputs[0])
    return made


def clock(tree: Any, rate: float, fps: float) -> Any:
    """Returns a value that grows by `rate` a second."""
    node = add(tree, "ShaderNodeValue")
    curve = node.outputs[0].driver_add("default_value")
    curve.driver.expression = f"frame*{rate / fps:.8f}"
    return node.outputs[0]


def glowing(name: str, color: Color, strength: float, power: float) -> Any:
    """Makes, for a sphere, light that fades towards its outline and covers nothing."""
    made, tree = material(name)
    facing = add(tree, "ShaderNodeLayerWeight", {"Blend": 0.5}).outputs["Facing"]
    inner = math(tree, "POWER", math(tree, "SUBTRACT", 1.0, facing), power)
    light = add(tree, "ShaderNodeEmission", {"Color": color, "Strength":
        math(tree, "MULTIPLY", inner, strength)}).outputs[0]  # fmt: skip
    clear = add(tree, "ShaderNodeBsdfTransparent").outputs[0]
    output(tree, add(tree, "ShaderNodeAddShader", {0: clear, 1: light}).outputs[0])
    return made
