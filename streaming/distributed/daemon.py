"""PySpark's daemon of Python workers, with TensorFlow imported once for all that it forks.

TensorFlow takes seconds to import, in every worker at the same time. Importing starts nothing that a fork would break;
what TensorFlow starts, it starts when it first computes, which happens in the workers.
"""

from pyspark import daemon

from streaming.distributed.network import quiet_tensorflow

if __name__ == "__main__":
    quiet_tensorflow()
    daemon.manager()
