import os

import pytest


@pytest.fixture(scope="package")
def ranks(tmp_path_factory):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from ranks import RankPool

    pool = RankPool(4, tmp_path_factory.mktemp("worlds"))
    yield pool
    pool.close()
