"""The vocabulary of the toybox world: every word a caption may hold, and the order the judge's labels use."""

OBJECTS = ("teddy", "teapot", "mug", "boat", "car", "fish", "house", "robot")
CONTAINERS = ("teapot", "mug", "boat", "car")  # what something can stand *in*
COLOURS = {  # word -> (hue in degrees, saturation range, brightness range)
    "red": (0, (0.75, 0.95), (0.70, 0.92)),
    "orange": (27, (0.80, 1.00), (0.90, 1.00)),
    "yellow": (53, (0.70, 0.95), (0.92, 1.00)),
    "green": (125, (0.55, 0.90), (0.50, 0.80)),
    "cyan": (181, (0.55, 0.90), (0.75, 0.95)),
    "blue": (224, (0.65, 0.95), (0.65, 0.95)),
    "purple": (276, (0.55, 0.85), (0.55, 0.85)),
    "pink": (328, (0.35, 0.60), (0.95, 1.00)),
}
HUE_SPREAD = 9.0  # degrees to either side of a colour word: an instance's own hue lies inside
PATTERNS = ("plain", "striped", "dotted", "checked")  # "plain" is never said
SCENES = {
    "beach": "on the beach",
    "snow": "in the snow",
    "forest": "in the forest",
    "night": "at night",
    "room": "in a room",
    "city": "in the city",
}
RELATIONS = ("alone", "in", "on", "next to")  # "alone" is never said
SIZES = ("usual", "small", "big")  # "usual" is never said; said of lone things only
STYLES = ("photo", "sketch", "pixel art")
FRAMES = ("a {}", "a {}", "a {}", "a photo of a {}", "a picture of a {}", "there is a {}", "one {}")
STYLE_FRAMES = {"sketch": "a sketch of a {}", "pixel art": "pixel art of a {}"}
