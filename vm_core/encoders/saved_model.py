"""TensorFlow SavedModels and TF-Hub handles."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from vm_core import storage
from vm_core.encoders import Embed, Encoder, digest_files
from vm_core.errors import VisualMemoryError

_HANDLE = ("https://", "http://")


class Plugin(Encoder):
    """A SavedModel folder, or a handle that tensorflow_hub resolves.

    The model takes (B, H, W, 3) float32, RGB in [0, 1] as TF-Hub's image models do,
    or what ``preprocessing`` makes of it, and returns (B, D). ``output`` picks one of
    several outputs by name.
    """

    kind: Literal["saved_model"] = "saved_model"
    output: str | None = None

    def model_digest(self) -> str:
        if self.path.startswith(_HANDLE):
            return f"{self.path} {self.output}"  # handles name an immutable version
        self._check_folder()
        # fingerprint.pb is left out: writing the same model again changes it.
        digest = digest_files(
            self.path,
            lambda name: name == "saved_model.pb" or name.startswith(("variables/", "assets/")),
        )
        return f"{digest} {self.output}"

    def load(self) -> Embed:
        with warnings.catch_warnings():  # tensorflow_hub 0.16.1 uses the old pkg_resources
            warnings.simplefilter("ignore", UserWarning)
            import tensorflow_hub as hub

        from vm_core.encoders._tensorflow import compile_embed, use_mixed_precision

        if self.precision == "mixed":
            use_mixed_precision()
        if self.path.startswith(_HANDLE):
            model = hub.load(self.path)
        else:
            self._check_folder()
            with storage.local_copy(self.path) as folder:
                model = hub.load(folder)
        if callable(model):
            call = model
        elif "serving_default" in model.signatures:
            call = model.signatures["serving_default"]
        else:
            raise VisualMemoryError(
                f"encoder: {self.path!r} is neither callable nor has a serving_default signature. "
                "Export it with a __call__ or with that signature"
            )
        return compile_embed(
            lambda images: self._pick(call(images)), self.preprocessing, keep=model
        )

    def _check_folder(self) -> None:
        if not storage.is_file(storage.join(self.path, "saved_model.pb")):
            raise VisualMemoryError(
                f"encoder: {self.path!r} is not a SavedModel (it has no saved_model.pb). Give the "
                "folder that tf.saved_model.save wrote, or a TF-Hub handle"
            )

    def _pick(self, outputs: Any) -> Any:
        if not isinstance(outputs, dict):
            return outputs
        if self.output is None and len(outputs) == 1:
            return next(iter(outputs.values()))
        if self.output not in outputs:
            raise VisualMemoryError(
                f"encoder: {self.path!r} has the outputs {', '.join(sorted(outputs))}; output = "
                f"{self.output!r} is none of them. Set output to one"
            )
        return outputs[self.output]
