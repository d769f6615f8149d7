"A shop's server on this machine, which does what stands in the names of its files; for tests."
import hashlib, io, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image
from patience import PATIENCE


def image(shade=0):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 90, 90)).save(buffer, "PNG")
    return buffer.getvalue()


class Answers(BaseHTTPRequestHandler):
    "A shop's server: what it does stands in the name of the file."
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        shop = self.server.shop
        name = self.path.partition("?")[0].lstrip("/")
        shop.log.append((name, dict(self.headers)))
        with shop.lock:
            shop.open += 1
            shop.most = max(shop.most, shop.open)
        try: self.answer(shop, name)
        except (BrokenPipeError, ConnectionResetError): pass
        finally:
            with shop.lock: shop.open -= 1

    def answer(self, shop, name):
        if name == "hang.jpg": return shop.end.wait(PATIENCE)
        if name == "drip.jpg": return self.drip(shop)
        if name == "cut.jpg":
            self.start(200, {"Content-Length": 1000})
            self.wfile.write(b"half")
            self.close_connection = True
            return
        if name == "loop.jpg": return self.send(302, b"", Location="/loop.jpg")
        if name == "moved.jpg": return self.send(302, b"", Location="/a.jpg")
        if name == "away.jpg": return self.send(302, b"", Location="file:///etc/passwd")
        if name == "page.jpg": return self.send(200, b"  <!DOCTYPE html><p>not found", **{"Content-Type": "image/jpeg"})
        if name == "endless.jpg": return self.endless(shop)
        if name == "busy.jpg" and shop.busy > 0:
            shop.busy -= 1
            return self.send(503, b"")
        if name == "later.jpg": return self.send(429, b"", **{"Retry-After": "9999"})
        if name.isdigit(): return self.send(int(name), b"")
        if name.startswith("slow"): time.sleep(.1)
        data = shop.files.get(name.removeprefix("slow").removeprefix("busy."))
        if data is None: return self.send(404, b"not here")
        etag = shop.etag(data)
        if etag and self.headers.get("If-None-Match") == etag: return self.send(304, None, ETag=etag)
        span = self.headers.get("Range")
        if span and shop.has_ranges:
            first, last = map(int, span.removeprefix("bytes=").split("-"))
            part = data[first:last + 1]
            return self.send(206, part, ETag=etag, **{"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"})
        self.send(200, data, **({"ETag": etag} if etag else {}))

    def start(self, status, headers):
        self.send_response(status)
        for key, value in headers.items(): self.send_header(key, str(value))
        self.end_headers()

    def send(self, status, data, **headers):
        if status == 200: self.server.shop.sent += 1
        self.start(status, headers | ({} if data is None else {"Content-Length": len(data)}))
        self.wfile.write(data or b"")

    def endless(self, shop):
        self.start(200, {"Connection": "close"})
        while not shop.end.is_set(): self.wfile.write(b"x" * 65536)

    def drip(self, shop):
        self.start(200, {"Connection": "close"})
        while not shop.end.wait(.1): self.wfile.write(b"x")

    def log_message(self, *_): pass


class Shop:
    def __init__(self):
        self.files, self.log, self.lock, self.end = {"a.jpg": image()}, [], threading.Lock(), threading.Event()
        self.open = self.most = self.busy = self.sent = 0  # answers under way, the most of them at once, refusals to come, answers with content
        self.etag = lambda data: f'"{hashlib.md5(data).hexdigest()}"'
        self.has_ranges = True
        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 64
        self.server = Server(("127.0.0.1", 0), Answers)
        self.server.shop = self
        threading.Thread(target=self.server.serve_forever, args=(.01,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self): return self

    def __exit__(self, *_):
        self.end.set()
        self.server.shutdown()
        self.server.server_close()
