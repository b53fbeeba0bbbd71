"""The prompts and the input image of the recorded references, for those who record them and those who read them."""

from PIL import Image

PROMPTS = ["a red circle, 3 blue squares", "Twelve green cats!"]
SIZE = (24, 16)  # width and height of the image, in pixels


def edited_image() -> Image.Image:
    """A gradient, other in each direction and colour."""
    image = Image.new("RGB", SIZE)
    image.putdata([(10 * x, 15 * y, 5 * (x + y)) for y in range(SIZE[1]) for x in range(SIZE[0])])
    return image
