#!/bin/sh
# Stands in for a program under the program's name: runs the real one, which is `real/NAME` beside it, unless there is a
# file `NAME.VERB.plan` beside it. VERB is what the program is asked for: the command of an OCI runtime, CNI_COMMAND of
# a plugin, `run` of conmon. The plan is a line `ACTION TIMES`, ACTION is
#   fail        end with an error, having done nothing
#   fail-after  do the work, and end with an error all the same
#   kill        be killed, having done nothing
#   garbage     print nonsense, and end well
#   hang        wait as long as the plan stands, then do the work
# Every call is noted as a line `VERB` in `NAME.calls`.
set -u
here=${0%/*}
name=${0##*/}

verb=${CNI_COMMAND-}
if [ "$name" = conmon ]; then
    verb=run
elif [ -z "$verb" ]; then
    for word; do
        case $word in
        -*) ;;
        *) verb=$word && break ;;
        esac
    done
fi
echo "$verb" >>"$here/$name.calls"

fail() {
    if [ -n "${CNI_COMMAND-}" ]; then
        echo '{"cniVersion": "1.0.0", "code": 11, "msg": "told to fail"}'
    else
        echo 'told to fail' >&2
    fi
    exit 1
}

plan=$here/$name.$verb.plan
if [ -e "$plan" ]; then
    read -r action times <"$plan"
    if [ "$times" -gt 0 ]; then
        echo "$action $((times - 1))" >"$plan"
        case $action in
        fail) fail ;;
        fail-after) "$here/real/$name" "$@" >/dev/null && fail ;;
        kill) kill -9 $$ ;;
        garbage) echo '{' && exit 0 ;;
        hang) while [ -e "$plan" ]; do sleep 0.05; done ;;
        esac
    fi
fi
exec "$here/real/$name" "$@"
