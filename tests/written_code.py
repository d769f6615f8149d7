"The Python that a plan emits, executed on a processor."
import re

from devsky_nb.hub.load import quiet

ON_CPU = [("device(\"cuda\")", "device(\"cpu\")"), ("to('cuda')", "to('cpu')"), ("offload()", "offload(device=\"cpu\")"),
          (", use_stream=True", ""), (", record_stream=True", ""), (", low_cpu_mem_usage=True", "")]


def drawn(code):
    "What the last line of a program draws, in few steps."
    scope = {}
    few = re.sub(r"= pipeline\((?=.)", "= pipeline(num_inference_steps=4, prompt=", code) if "pipeline(\"" in code or "pipeline([" in code else code.replace(
        "= pipeline(", "= pipeline(num_inference_steps=4, ")
    with quiet("diffusers", "transformers"): exec(few, scope)
    return scope, scope.get("images", scope.get("frames"))
