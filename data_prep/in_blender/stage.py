"""The things that every scene has: film, camera, lights, and the frames that are written."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bpy
from mathutils import Vector
from nodes import add, linear

FAR = 1.0  # units that nothing moves in a frame
Update = Callable[[float], None]  # called with the seconds of each frame


def empty() -> Any:
    """Removes everything of the clip before."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    return bpy.context.scene


def film(scene: Any, facts: dict[str, Any], threads: int) -> None:
    render, cycles = scene.render, scene.cycles
    render.engine, cycles.device, cycles.samples = "CYCLES", "CPU", facts["samples"]
    cycles.seed, cycles.use_animated_seed, cycles.use_adaptive_sampling = (
        facts["seed"],
        False,
        False,
    )
    cycles.max_bounces, cycles.transparent_max_bounces = 10, 24
    cycles.volume_bounces, cycles.caustics_reflective, cycles.caustics_refractive = 1, False, False
    cycles.sample_clamp_indirect, cycles.volume_biased = 4.0, True
    cycles.film_transparent_glass, cycles.film_transparent_roughness = True, 0.2
    cycles.use_denoising = False  # the compositor does that, for alpha as well
    render.film_transparent, render.resolution_percentage = True, 100
    render.resolution_x, render.resolution_y = facts["width"], facts["height"]
    render.threads_mode, render.threads = "FIXED", threads
    render.fps, render.use_motion_blur, render.motion_blur_shutter = facts["fps"], True, 0.5
    render.motion_blur_position = "START"  # jumps of `move` come between shutter times
    image = render.image_settings
    image.file_format, image.color_mode, image.color_depth = "OPEN_EXR", "RGBA", "32"
    scene.frame_start, scene.frame_end = 0, facts["frames"] - 1
    bpy.context.view_layer.cycles.denoising_store_passes = True
    denoised(scene)


def denoised(scene: Any) -> None:
    """Sets up Open Image Denoise for light, guided by albedo and normals, and for alpha."""
    tree = bpy.data.node_groups.new("denoised", "CompositorNodeTree")
    tree.interface.new_socket("Image", in_out="OUTPUT", socket_type="NodeSocketColor")
    layers = add(tree, "CompositorNodeRLayers").outputs
    guides = {"Albedo": layers["Denoising Albedo"], "Normal": layers["Denoising Normal"]}
    filtered = [
        add(tree, "CompositorNodeDenoise", {"Image": layers[name], "Prefilter": "Fast", **guided})
        for name, guided in (("Image", guides), ("Alpha", {}))
    ]
    whole = add(tree, "CompositorNodeSetAlpha", {"Image": filtered[0].outputs[0],
        "Alpha": filtered[1].outputs[0], "Type": "Replace Alpha"})  # fmt: skip
    add(tree, "NodeGroupOutput", {0: whole.outputs[0]})
    scene.compositing_node_group, scene.render.use_compositing = tree, True


def aim(thing: Any, place: Vector) -> None:
    thing.location = place
    thing.rotation_euler = (-place).to_track_quat("-Z", "Y").to_euler()


def around(azimuth: float, elevation: float, distance: float) -> Vector:
    """Returns a place by degrees; azimuth 0 is in front, 90 to the right of the picture."""
    a, e = math.radians(azimuth), math.radians(elevation)
    return distance * Vector((math.sin(a) * math.cos(e), -math.cos(a) * math.cos(e), math.sin(e)))


def camera(scene: Any, facts: dict[str, Any]) -> None:
    """Places the camera: the short side of the picture shows 2.4 units at the origin for a zoom of
    1."""
    chosen = facts["camera"]
    data = bpy.data.cameras.new("camera")
    made = bpy.data.objects.new("camera", data)
    scene.collection.objects.link(made)
    data.sensor_fit = "HORIZONTAL" if facts["width"] <= facts["height"] else "VERTICAL"
    data.sensor_width = data.sensor_height = 24.0
    data.lens = 50.0
    distance = 1.2 * 2 * data.lens / 24.0 / chosen["zoom"]
    for frame in (-1, facts["frames"]):
        seconds = frame / facts["fps"]
        turned = chosen["azimuth"] + chosen["orbit"] * seconds
        aim(made, around(turned, chosen["elevation"], distance / (1 + chosen["dolly"] * seconds)))
        made.keyframe_insert("location", frame=frame)
        made.keyframe_insert("rotation_euler", frame=frame)
    straight(made)
    scene.camera = made


def lights(scene: Any, facts: dict[str, Any]) -> None:
    """Places softboxes, which reflections show, and a sky that is lighter above."""
    chosen = facts["light"]
    for turn, rise, power, size in (
        (chosen["azimuth"], chosen["elevation"], chosen["power"], chosen["size"]),
        (chosen["azimuth"] + 130, 25, 0.35 * chosen["power"], 2.5),
        (chosen["azimuth"] - 110, 50, 0.25 * chosen["power"], 2.0),
    ):
        data = bpy.data.lights.new("light", "AREA")
        data.energy, data.size, data.color = power, size, linear(chosen["color"])[:3]
        made = bpy.data.objects.new("light", data)
        aim(made, around(turn, rise, 5.0))
        scene.collection.objects.link(made)
    world = bpy.data.worlds.new("world")
    world.use_nodes = True
    tree = world.node_tree
    tree.nodes.clear()
    up = add(tree, "ShaderNodeSeparateXYZ", {0: add(tree, "ShaderNodeTexCoord").outputs[0]})
    height = add(tree, "ShaderNodeMapRange", {"Value": up.outputs[2], "From Min": -1.0,
        "To Min": 0.05, "To Max": 1.0}).outputs[0]  # fmt: skip
    sky = add(tree, "ShaderNodeBackground", {"Color": linear(chosen["sky"]), "Strength": height})
    add(tree, "ShaderNodeOutputWorld", {0: sky.outputs[0]})
    world.cycles.sampling_method = "NONE"  # a map of so smooth a sky takes a second a frame
    scene.world = world


def curves_of(thing: Any) -> Any:
    """Returns the animation curves of an object or node tree."""
    action = thing.animation_data.action
    return action.layers[0].strips[0].channelbags[0].fcurves


def straight(thing: Any) -> None:
    """Keyframes without easing."""
    for curve in curves_of(thing):
        for key in curve.keyframe_points:
            key.interpolation = "LINEAR"


def move(thing: Any, facts: dict[str, Any], place: Callable[[float], dict[str, Any]]) -> None:
    """Keyframes for each frame and those around, which motion blur needs. place: seconds -> values
    of location, rotation_euler, scale."""
    for frame in range(-1, facts["frames"] + 1):
        for name, value in place(frame / facts["fps"]).items():
            setattr(thing, name, value)
            thing.keyframe_insert(name, frame=frame)
    straight(thing)
    for curve in curves_of(thing):
        if curve.data_path == "location":
            for key, after in zip(curve.keyframe_points, curve.keyframe_points[1:], strict=False):
                if abs(after.co[1] - key.co[1]) > FAR:  # it begins anew elsewhere, without a smear
                    key.interpolation = "CONSTANT"


def shoot(scene: Any, facts: dict[str, Any], folder: Path, updates: list[Update]) -> list[float]:
    """Writes FRAME.exr for each frame; the seconds that each took."""
    seconds = []
    for frame in range(facts["frames"]):
        begun = time.perf_counter()
        scene.frame_set(frame)
        for update in updates:
            update(frame / facts["fps"])
        scene.render.filepath = str(folder / f"{frame:05d}.exr")
        bpy.ops.render.render(write_still=True)
        seconds.append(time.perf_counter() - begun)
    return seconds
