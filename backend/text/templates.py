"""The chat templates that the Kandinsky 5 models were trained with, and how much of their beginning is cut off."""

from __future__ import annotations

from dataclasses import dataclass

from backend.errors import UserError

END_OF_TURN = "<|im_end|>"

# Model data: "promt" and "scren" are what the models were trained with. Correcting the first one alone shortens the
# beginning by one token and so shifts every prompt.
_VIDEO_TEXT = "\n".join(
    (
        "<|im_start|>system\nYou are a promt engineer. Describe the video in detail.",
        "Describe how the camera moves or shakes, describe the zoom and view angle, whether it follows the objects.",
        "Describe the location of the video, main characters or objects and their action.",
        "Describe the dynamism of the video and presented actions.",
        "Name the visual style of the video: whether it is a professional footage, user generated content, "
        "some kind of animation, video game or scren content.",
        "Describe the visual effects, postprocessing and transitions if they are presented in the video.",
        "Pay attention to the order of key actions shown in the scene.<|im_end|>",
        "<|im_start|>user\n{}<|im_end|>",
    )
)
_IMAGE_TEXT = "\n".join(
    (
        "<|im_start|>system\nYou are a promt engineer. Describe the image by detailing the color, shape, size, "
        "texture, quantity, text, spatial relationships of the objects and background:<|im_end|>",
        "<|im_start|>user\n{}<|im_end|>",
    )
)


@dataclass(frozen=True)
class PromptTemplate:
    """One chat template: its text with `{}` where the prompt goes, and the published numbers that belong to it.

    `crop` is the published number of tokens before the prompt (in Qwen2.5's vocabulary the exact length of `prefix`);
    `max_length` is the largest number of tokens that is kept after the crop, the end token included.
    """

    name: str
    text: str
    crop: int
    max_length: int

    @property
    def prefix(self) -> str:
        """Everything before the prompt."""
        return self.text.split("{}", 1)[0]

    @property
    def suffix(self) -> str:
        """Everything after the prompt: the end-of-turn token."""
        return self.text.split("{}", 1)[1]

    def wrap(self, prompt: str) -> str:
        """The whole conversation; braces in the prompt stay as they are."""
        return self.prefix + prompt + self.suffix


# Image-to-video uses the video template too.
VIDEO = PromptTemplate("video", _VIDEO_TEXT, crop=129, max_length=256)
IMAGE = PromptTemplate("image", _IMAGE_TEXT, crop=41, max_length=512)
TEMPLATES = {template.name: template for template in (VIDEO, IMAGE)}


def get_template(name: str) -> PromptTemplate:
    """The template called `name`.

    Raises:
        UserError: there is no such template.
    """
    if name not in TEMPLATES:
        raise UserError(f"There is no prompt template {name!r}; there are {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]
