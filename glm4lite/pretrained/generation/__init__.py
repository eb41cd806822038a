"""`model.generate` as Transformers documents it: batches of ids in, ids out, with torch's own random numbers.

A script's loop, for whole batches; chats and the server generate with `engine.decoding`, which keeps
prefixes, can be stopped and knows no batches.
"""

from glm4lite.pretrained.generation.config import GenerationConfig
from glm4lite.pretrained.generation.loop import generate

__all__ = ["GenerationConfig", "generate"]
