"""The HTTP server: OpenAI's API (`/v1/...`), `/health` and `/metrics`, on one EngineWorker.

    worker = EngineWorker(Engine.load("nano"))
    app = create_app(worker, "nano")

The app refuses other Hosts and Origins than its own, and whoever lacks the key where there is one; a page mounted on
it is guarded the same way.
"""

from glm4lite.server.app import create_app
from glm4lite.server.launch import Address, serve

__all__ = ["Address", "create_app", "serve"]
