"""The HTTP server: OpenAI's and Anthropic's APIs (`/v1/...`), `/health` and `/metrics`, on one EngineWorker.

    worker = EngineWorker(Engine.load("nano"))
    app = create_app(worker, "nano")

The app refuses other Hosts and Origins than its own, and whoever lacks the key where there is one; a page mounted on
it is guarded the same way.
"""

from glm4lite.server.app import create_app
from glm4lite.server.endpoint import ModelNames
from glm4lite.server.guard import Access
from glm4lite.server.launch import Address, serve

__all__ = ["Access", "Address", "ModelNames", "create_app", "serve"]
