"The widgets in JupyterLab: started for real, driven by keyboard and mouse, without a complaint on the console."
import os, re, secrets, shutil, socket, subprocess, sys, time, urllib.request
from importlib.util import find_spec
from pathlib import Path

import nbformat, pytest

from browser import open_page, unavailable

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[1]
TOKEN = secrets.token_hex(8)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab on copies of the notebooks, with a home of its own; its address."
    if find_spec("jupyterlab") is None: unavailable("jupyterlab is not installed: `make browser` installs it and runs these tests")
    home = tmp_path_factory.mktemp("lab")
    for folder in ("nbs", "tests"): (home / folder).mkdir()
    for name in ("10_vram", "14_widgets"): shutil.copy(ROOT / "nbs" / f"{name}.ipynb", home / "nbs")
    shutil.copy(ROOT / "tests" / "hubcache.py", home / "tests")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = os.environ | {"HOME": str(home), "PYTHONPATH": str(ROOT), "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_DATA_DIR": str(home / "data"),
                        "JUPYTER_RUNTIME_DIR": str(home / "runtime"), "IPYTHONDIR": str(home / "ipython"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}",
               "--allow-root", f"--ServerApp.root_dir={home}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None", "--LabApp.expose_app_in_browser=True"]
    log = (home / "lab.log").open("w")
    server = subprocess.Popen(command, cwd=home, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/api?token={TOKEN}"), 90, lambda: (home / "lab.log").read_text()[-2000:], server)
        yield f"http://127.0.0.1:{port}", home
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()
        log.close()


def answers(url):
    try: return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError: return False


def wait_until(true, seconds, story, server):
    end = time.monotonic() + seconds
    while not true():
        if server.poll() is not None or time.monotonic() > end: pytest.fail(f"JupyterLab did not start: {story()}")
        time.sleep(.2)


def write_notebook(home, name, *sources):
    "A notebook of its own for a test."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nbformat.write(nb, home / "nbs" / f"{name}.ipynb")


def run_all(page, address, name, theme="light"):
    "Open a notebook, run every cell, and wait until the kernel is idle again."
    page.goto(f"{address}/lab/workspaces/{name}-{secrets.token_hex(3)}/tree/nbs/{name}.ipynb?token={TOKEN}")
    page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)").wait_for(timeout=90_000)
    page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']").first.wait_for(timeout=90_000, state="attached")
    page.evaluate("() => window.jupyterapp && 0")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    return page
