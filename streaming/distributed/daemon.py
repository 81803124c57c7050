"""PySpark's worker daemon with TensorFlow imported once before it forks workers.

Importing TensorFlow takes seconds. It starts no threads, which a fork would not copy, until its first computation,
which happens in the workers.
"""

from pyspark import daemon

from streaming.distributed.network import quiet_tensorflow

if __name__ == "__main__":
    quiet_tensorflow()
    daemon.manager()
