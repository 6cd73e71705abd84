"""Tests of export/quality: the choice by true attention mass."""
