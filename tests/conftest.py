"No test asks the network or touches the cache of whoever runs it."
import os, tempfile

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": tempfile.mkdtemp(prefix="devsky-tests-")}
