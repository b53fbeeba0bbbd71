"""Web servers that say what a test wants them to say."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HEALTH = {"reward": "a", "version": "1", "low": 0.0, "high": None, "max_images": 8, "max_bytes": 4096}
GOOD = {"scores": [0.25, 0.5], "reward": "a", "version": "1"}
Answer = Callable[[str], tuple]  # path -> status, body, and headers if there are any


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """A web server in a thread, which answers as it is told; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, body, *headers = answer(self.path)
            self.send_response(status)
            for name, value in dict(*headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def says(health: Any = HEALTH, scores: Any = GOOD, status: int = 200) -> Answer:
    """As a reward service that is in this state and answers requests for scores with this, a value or bytes."""

    def answer(path: str) -> tuple:
        said = health if path.endswith("/health") else scores
        return (200 if path.endswith("/health") else status), said if isinstance(said, bytes) else json.dumps(said).encode()

    return answer
