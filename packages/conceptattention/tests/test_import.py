import subprocess
import sys


def test_import_is_light():
    code = (
        "import sys, conceptattention\n"
        "conceptattention.ConceptAttention, conceptattention.segment\n"
        "heavy = {'diffusers', 'transformers', 'triton', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name_is_an_attribute_error():
    import pytest

    import conceptattention

    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = conceptattention.nothing
    assert set(conceptattention.__all__) <= set(dir(conceptattention))
