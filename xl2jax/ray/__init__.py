"""Many videos and many hosts: Ray Data over files of questions, and the HTTP server on Ray Serve.

from xl2jax.ray import Settings, answer_file

answer_file(Path("in.parquet"), Path("out"), Settings("checkpoints/video-xl-2"), actors=8, num_gpus=1)

`cluster.py` joins or starts Ray. `rows.py` reads the input, `output.py` keeps the answers, `batch.py` brings the rows to
the actors. `serving.py` is the deployment of the server. Ray itself is imported when it is first needed.
"""

from xl2jax.ray.batch import answer_file
from xl2jax.ray.questions import Settings
from xl2jax.ray.rows import Columns

__all__ = ["Columns", "Settings", "answer_file"]
