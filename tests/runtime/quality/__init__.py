"""Tests of runtime/quality: the questions, the scores, the statistics, the page, whole runs on tiny bundles."""
