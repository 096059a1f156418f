"""Its tests are in test_classifiers.py; tests/encoders/test_sources_in_use.py takes this from here."""

from tests.frozen import read as read
