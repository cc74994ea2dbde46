"""Rebuild the demo model: python -m backend.demo.build [--stage NAME] [--minutes N] [--work DIR] [--out DIR].

Stages, in order: text, captions, vae-images, vae-decoder, encode, transformer, export. A finished stage is skipped, an
interrupted one goes on from its last checkpoint; naming a stage runs it again, from its own last weights, so training
can be continued. Everything happens in the work folder; only `export` writes the weights.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo, Kandinsky5Transformer3DModel

from backend.config.tasks import DEFAULT_NEGATIVE_PROMPT, DEMO_WEIGHTS
from backend.demo.dataset import CaptionTable, encode_shard, every_caption
from backend.demo.text_models import build_text_models
from backend.demo.train_dit import DitSettings, new_transformer, train_transformer
from backend.demo.train_vae import VaeModel, VaeStage, assess, new_vae, train_decoder, train_images
from backend.files import atomic_path, write_atomic
from backend.text.templates import IMAGE, VIDEO

NO_TEXT = ("", DEFAULT_NEGATIVE_PROMPT)
_SHARD = 256
_DIFFUSERS_CORRECTED = VIDEO.text.replace("promt engineer", "prompt engineer")
# Shares of --minutes.
_SHARES = {"vae-images": 0.35, "vae-decoder": 0.2, "transformer": 0.45}


@dataclass(frozen=True)
class Builder:
    """One build: where it works, where it starts from, how long it may take.

    start: a folder of finished weights (diffusers layout) to go on from, or None for a build from nothing.
    """

    work: Path
    out: Path
    minutes: float
    clips: int
    start: Path | None = None

    def seconds(self, stage: str) -> float:
        """Time of a training stage."""
        return self.minutes * 60 * _SHARES[stage]

    def weights(self, name: str, *stages: str) -> Path | None:
        """The newest existing weights called `name`: of the given stages, else of the start folder."""
        folders = [self.work / stage for stage in stages] + ([self.start / name] if self.start else [])
        return next((folder for folder in folders if (folder / "config.json").exists()), None)

    def vae(self, *stages: str) -> VaeModel:
        """The newest VAE of the stages (float32), or a new one; whole clips at once, no temporal windows."""
        folder = self.weights("vae", *stages)
        vae = AutoencoderKLHunyuanVideo.from_pretrained(folder, torch_dtype=torch.float32) if folder else new_vae()
        vae.use_framewise_encoding = vae.use_framewise_decoding = False
        return vae

    def text(self) -> None:
        """Tokenizers and frozen encoders; diffusers' corrected spelling is learned too, so its template fits."""
        if self.start:
            for name in ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"):
                shutil.copytree(self.start / name, self.work / "text" / name, dirs_exist_ok=True)
        else:
            build_text_models(self.work / "text", [_DIFFUSERS_CORRECTED, VIDEO.text, IMAGE.text])

    def captions(self) -> None:
        """Embed every caption of the grammar with the official video template."""
        CaptionTable.embed([*NO_TEXT, *every_caption()], self.work / "text").save(self.work / "captions.safetensors")

    def vae_images(self) -> None:
        """First VAE stage."""
        vae = self.vae("vae-images")
        train_images(vae, VaeStage(self.seconds("vae-images"), rate=2.5e-3, batch=16), self.work / "vae-images")
        print(assess(vae))

    def vae_decoder(self) -> None:
        """Second VAE stage."""
        vae = self.vae("vae-decoder", "vae-images")
        stage = VaeStage(self.seconds("vae-decoder"), rate=1.5e-3, batch=2, hold=0.25, seed=7)
        train_decoder(vae, stage, self.work / "vae-decoder")
        print(assess(vae))

    def encode(self) -> None:
        """Draw and encode the clips; every eighth shard holds clips of 9 frames."""
        vae = self.vae("vae-decoder", "vae-images").eval()
        for index in range(max(1, self.clips // _SHARD)):
            path = self.work / "shards" / f"{index:03d}.safetensors"
            frames = 9 if index % 8 == 7 else 17
            encode_shard(vae, path, min(_SHARD, self.clips), frames, seed=100 + index)
            print(f"encoded {path.name}: {frames} frames", flush=True)

    def transformer(self) -> None:
        """Train the transformer on the shards."""
        folder = self.weights("transformer", "transformer")
        model = (
            Kandinsky5Transformer3DModel.from_pretrained(folder, torch_dtype=torch.float32)
            if folder
            else new_transformer()
        )
        captions = CaptionTable.load(self.work / "captions.safetensors")
        settings = DitSettings(seconds=self.seconds("transformer"))
        train_transformer(model, self.work / "shards", captions, list(NO_TEXT), settings, self.work / "transformer")

    def export(self) -> None:
        """Write the weights in half precision, each file whole or not at all."""
        staging = self.work / "export"
        shutil.rmtree(staging, ignore_errors=True)
        shutil.copytree(self.work / "text", staging)
        self.vae("vae-decoder", "vae-images").half().save_pretrained(staging / "vae")
        transformer = Kandinsky5Transformer3DModel.from_pretrained(self.work / "transformer", torch_dtype=torch.float32)
        transformer.half().save_pretrained(staging / "transformer")
        for part in ("vae", "transformer"):
            # diffusers notes the folder that the weights came from; that is nobody's business.
            config = json.loads((staging / part / "config.json").read_text(encoding="utf-8"))
            config.pop("_name_or_path", None)
            write_atomic(staging / part / "config.json", json.dumps(config, indent=2) + "\n")
        for source in sorted(path for path in staging.rglob("*") if path.is_file()):
            with atomic_path(self.out / source.relative_to(staging)) as temporary:
                shutil.copyfile(source, temporary)
        total = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
        print(f"{total / 1e6:.1f} MB in {self.out}")

    def stages(self) -> dict[str, Callable[[], None]]:
        """The stages by name, in order."""
        return {
            "text": self.text,
            "captions": self.captions,
            "vae-images": self.vae_images,
            "vae-decoder": self.vae_decoder,
            "encode": self.encode,
            "transformer": self.transformer,
            "export": self.export,
        }

    def run(self, only: str | None) -> None:
        """Run one stage, or all that are not finished."""
        self.work.mkdir(parents=True, exist_ok=True)
        for name, stage in self.stages().items():
            done = self.work / f"{name}.done"
            if only not in (None, name) or (only is None and done.exists()):
                continue
            print(f"--- {name}", flush=True)
            stage()
            write_atomic(done, "")


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description="Build the demo model.", allow_abbrev=False)
    names = list(Builder(Path(), Path(), 0, 0).stages())
    parser.add_argument("--stage", choices=names, help="run this stage only, even when it is finished")
    parser.add_argument("--minutes", type=float, default=180, help="training time of all stages together")
    parser.add_argument("--clips", type=int, default=6144, help="clips that the transformer learns from")
    parser.add_argument("--work", type=Path, default=Path("build/demo-model"), help="work folder")
    parser.add_argument("--out", type=Path, default=DEMO_WEIGHTS, help="where export writes the weights")
    parser.add_argument("--start", type=Path, help="go on from these finished weights instead of from nothing")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    Builder(options.work, options.out, options.minutes, options.clips, options.start).run(options.stage)


if __name__ == "__main__":
    main()
