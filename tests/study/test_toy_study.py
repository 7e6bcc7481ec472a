"Rung b: rows in processes of their own are those of one process, and a study that was stopped goes on."
import json

import g2rpo.study.toy_study as study
from g2rpo.study.toy import ToyConfig

def test_rows_in_processes_are_those_of_one(tmp_path, monkeypatch):
    file = tmp_path/'toy.json'
    monkeypatch.setattr(study, 'LADDER_CLAIMS', [study.Claim('TMPO > TreeGRPO', 'tmpo', 'tree_grpo')])
    monkeypatch.setattr(study, 'TOY_NAMES', ('tree_grpo',))
    study.toy_study(file, 2, 300)
    monkeypatch.setattr(study, 'TOY_NAMES', ('tree_grpo', 'tmpo'))
    stored, records, (held, trained) = study.toy_study(file, 2, 300)
    assert list(stored['rows']) == ['tree_grpo', 'tmpo'] == list(records.rows) and held['seeds'] == 2
    alone = study._study_rows(('tmpo',), ToyConfig(300, replicas=2))
    assert stored['rows']['tmpo'] == alone['rows']['tmpo'] and stored['rates']['tmpo'] == alone['rates']['tmpo']
    assert json.loads(file.read_text()) == stored
