"""What `import bn_fast` takes beyond `import numpy`: python -P tests/import_time.py

The least of many processes, as noise only adds. No test: no timing decides.
"""

import subprocess
import sys

CODE = """
import time, numpy
start = time.perf_counter()
import bn_fast
print(time.perf_counter() - start)
"""
N = 20
times = [
    float(
        subprocess.run([sys.executable, "-P", "-c", CODE], capture_output=True, check=True).stdout
    )
    for _ in range(N)
]
print(f"import bn_fast: {1000 * min(times):.1f} ms beyond NumPy's (the least of {N})")
sys.exit(min(times) > 0.03)
