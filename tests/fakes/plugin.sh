#!/bin/sh
# A CNI plugin of version 1.1 that attaches nothing: every pod gets the same address, on paper only.
#
# Each call is noted as a line of JSON in `NAME.calls` beside it: its variables, and what it read. VERB fails while there
# is a file `NAME.VERB.fails` with the message, and takes as long as there is a file `NAME.VERB.hangs`.
set -u
name=${0##*/}
me=${0%/*}/$name
verb=$CNI_COMMAND
printf '{"verb": "%s", "id": "%s", "netns": "%s", "stdin": %s}\n' \
    "$verb" "${CNI_CONTAINERID-}" "${CNI_NETNS-}" "$(cat)" >>"$me.calls"

while [ -e "$me.$verb.hangs" ]; do sleep 0.05; done
if [ -e "$me.$verb.fails" ]; then
    printf '{"cniVersion": "1.1.0", "code": 50, "msg": "%s"}\n' "$(cat "$me.$verb.fails")"
    exit 1
fi
if [ "$verb" = ADD ]; then
    interface="{\"name\": \"eth0\", \"sandbox\": \"$CNI_NETNS\"}"
    address='{"address": "192.0.2.9/24", "interface": 0}'
    echo "{\"cniVersion\": \"1.1.0\", \"interfaces\": [$interface], \"ips\": [$address]}"
fi
